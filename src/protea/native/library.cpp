// The C interface: it looks at the processor and passes each call to the functions for its instructions.
//
// This file is compiled for the oldest processors of a platform, so that it can refuse where nothing else runs.

#include "kernels.h"

#include <cstring>

// PROTEA_SETS(X) is X(avx512) X(avx2), or what else the builder compiled, the best first.
#define DECLARED(set) extern "C" const Kernels protea_kernels_##set;
#define ADDRESS(set) &protea_kernels_##set,
PROTEA_SETS(DECLARED)

namespace {

const Kernels* const ALL[] = {PROTEA_SETS(ADDRESS)};

bool is(const Kernels* kernels, const char* name) { return !strcmp(kernels->name, name); }

}  // namespace

#if defined(__x86_64__)
#include <cpuid.h>

namespace {

// Registers that the operating system saves when it switches threads; instructions on others would lose their values.
uint64_t saved_registers() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

bool has(const Kernels* kernels) {
    uint32_t a, b, c, d, leaves;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
    const bool fma = c >> 12 & 1, saving = c >> 27 & 1, avx = c >> 28 & 1;
    if (!fma || !saving || !avx || (saved_registers() & 0x6) != 0x6) return false;
    if (!__get_cpuid_count(7, 0, &leaves, &b, &c, &d) || !(b >> 5 & 1)) return false;  // AVX2
    if (is(kernels, "avx2")) return true;
    const uint32_t f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    const bool avx512 = (b & f_dq_bw_vl) == f_dq_bw_vl && (saved_registers() & 0xe6) == 0xe6, vnni = c >> 11 & 1;
    if (is(kernels, "avx512")) return avx512;
    if (is(kernels, "avx512vnni")) return avx512 && vnni;
    if (leaves < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
    if (is(kernels, "avx2vnni")) return a >> 4 & 1;
    return avx512 && vnni && (a >> 5 & 1);  // AVX-512 BF16
}

}  // namespace

#elif defined(__aarch64__)

namespace {

bool has(const Kernels*) { return true; }  // every 64-bit ARM has it

}  // namespace

#else
#error "the library is for x86-64 and 64-bit ARM"
#endif

namespace {

const Kernels* best() {
    for (const Kernels* kernels : ALL)
        if (has(kernels)) return kernels;
    return nullptr;
}

const Kernels* used = best();

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The version of this interface, which protea/native/__init__.py expects.
EXPORTED int protea_version() { return 2; }

// The name of the instruction set in use; null if the processor has none of them, and then nothing else may be called.
EXPORTED const char* protea_instruction_set() { return used ? used->name : nullptr; }

// Use the set with a name. Returns 0, 1 if the library does not have it, or 2 if the processor does not.
EXPORTED int protea_use(const char* name) {
    for (const Kernels* kernels : ALL)
        if (is(kernels, name)) {
            if (!has(kernels)) return 2;
            used = kernels;
            return 0;
        }
    return 1;
}

EXPORTED int64_t protea_types() { return used->types; }

EXPORTED int64_t protea_packed_bytes(int64_t outputs, int64_t inputs, int64_t type) {
    return used->packed_bytes(outputs, inputs, type);
}

EXPORTED void protea_pack_linear(void* to, const void* weight, int64_t outputs, int64_t inputs, int64_t type,
                                 int64_t output_stride, int64_t input_stride) {
    used->pack_linear(to, weight, outputs, inputs, type, output_stride, input_stride);
}

EXPORTED void protea_unpack_linear(void* to, const void* packed, int64_t outputs, int64_t inputs, int64_t type) {
    used->unpack_linear(to, packed, outputs, inputs, type);
}

// These return 0, or 1 if memory ran out.
EXPORTED int protea_linear(const Linear* call, int64_t threads, Parallel parallel) {
    return used->linear(call, threads, parallel);
}

EXPORTED int protea_rotate(const Rotation* call, int64_t threads, Parallel parallel) {
    return used->rotate(call, threads, parallel);
}

EXPORTED int protea_attention_forward(const Attention* call, int64_t threads, Parallel parallel) {
    return used->attention_forward(call, threads, parallel);
}

EXPORTED int protea_attention_backward(const Attention* call, int64_t threads, Parallel parallel) {
    return used->attention_backward(call, threads, parallel);
}
