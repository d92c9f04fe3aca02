// The functions of kernels.h for one instruction set. The builder compiles this file once for each, with the set's
// options and with PROTEA_SET as its name.

#include "kernels.h"

#include <cfloat>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// What C++ calls for the destructors of a thread's variables.
#if defined(__APPLE__)
extern "C" void _tlv_atexit(void (*function)(void*), void* argument);
static inline void at_end_of_thread(void (*function)(void*)) { _tlv_atexit(function, nullptr); }
#else
extern "C" __attribute__((weak)) int __cxa_thread_atexit_impl(void (*function)(void*), void* argument, void* library);
static inline void at_end_of_thread(void (*function)(void*)) {
    if (__cxa_thread_atexit_impl) __cxa_thread_atexit_impl(function, nullptr, (void*)function);
}
#endif

#define JOINED(a, b) a##b
#define NAMED(a, b) JOINED(a, b)
#define STRING(a) #a
#define STRING_OF(a) STRING(a)

namespace PROTEA_SET {
namespace {

#include "attention.h"
#include "attention_bf16.h"
#include "attention_threads.h"
#include "linear.h"
#include "rotation.h"
#include "simd.h"

#if defined(__AVX512BF16__)
constexpr int64_t PAIRS = 1 << BFLOAT16;
#else
constexpr int64_t PAIRS = 0;
#endif
#if defined(MULTIPLIES_BYTES)
constexpr int64_t TYPES = 1 << FLOAT32 | PAIRS | 1 << INT8;
#else
constexpr int64_t TYPES = 1 << FLOAT32 | PAIRS;
#endif

}  // namespace
}  // namespace PROTEA_SET

extern "C" __attribute__((visibility("hidden"))) const Kernels NAMED(protea_kernels_, PROTEA_SET) = {
    STRING_OF(PROTEA_SET),
    PROTEA_SET::packed_bytes,
    PROTEA_SET::pack_linear,
    PROTEA_SET::unpack_linear,
    PROTEA_SET::linear,
    PROTEA_SET::rotate,
    PROTEA_SET::attention_forward,
    PROTEA_SET::attention_backward,
    PROTEA_SET::TYPES,
};
