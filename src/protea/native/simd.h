// Vectors of the instruction set that this file is compiled for, in the compiler's own vector types.
//
// GCC and Clang compile arithmetic on these types for every processor; only what they cannot express well is written
// with a processor's own instructions.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 32")

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

using bf16 = uint16_t;
using pair = uint32_t;  // two bfloat16, the first in the low half
typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t ivec __attribute__((vector_size(BYTES)));
typedef float loose_vec __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int32_t loose_ivec __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef uint16_t half_ivec __attribute__((vector_size(BYTES / 2)));
typedef uint16_t loose_half_ivec __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline vec load(const float* p) { return *(const loose_vec*)p; }
inline void store(float* p, vec x) { *(loose_vec*)p = x; }
inline vec all(float x) { return x - vec{}; }  // x - 0 is x for every x
inline vec as_float(ivec x) { return (vec)x; }
inline ivec as_int(vec x) { return (ivec)x; }

// The larger of both; NaN if `x` is NaN.
inline vec larger(vec x, vec y) {
#if defined(__AVX512F__)
    return _mm512_max_ps(y, x);  // returns the second if either is NaN
#elif defined(__AVX2__)
    return _mm256_max_ps(y, x);
#else
    return x < y ? y : x;
#endif
}

// Up to LANES items; the rest is 0.
inline vec load_first(const float* p, int64_t n) {
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps(n >= LANES ? 0xffff : (1u << n) - 1, p);
#else
    if (n >= LANES) return load(p);
    float x[LANES] = {};
    for (int64_t i = 0; i < n; i++) x[i] = p[i];
    return load(x);
#endif
}

inline void store_first(float* p, vec x, int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, n >= LANES ? 0xffff : (1u << n) - 1, x);
#else
    if (n >= LANES) return store(p, x);
    for (int64_t i = 0; i < n; i++) p[i] = x[i];
#endif
}

// The same past the caches, for what this thread will not read soon: a common store first fetches the line that it
// overwrites, which takes longer than all else. `finish_streams` makes sure that other threads see it.
inline void stream_first(float* p, vec x, int64_t n) {
#if defined(__AVX512F__)
    if (n >= LANES && (uintptr_t)p % BYTES == 0) return _mm512_stream_ps(p, x);
#elif defined(__AVX2__)
    if (n >= LANES && (uintptr_t)p % BYTES == 0) return _mm256_stream_ps(p, x);
#endif
    store_first(p, x, n);
}

inline void finish_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// The first n lanes of x, and the others of y.
inline vec joined(vec x, vec y, int64_t n) {
    for (int64_t i = n; i < LANES; i++) x[i] = y[i];
    return x;
}

// The bits of bfloat16 in the low half of each lane, rounded to the nearest, ties to even; NaN stays NaN.
inline ivec narrow_bits(vec x) {
    const ivec bits = as_int(x), last = (bits >> 16) & 1;
    const ivec rounded = (ivec)((bits + (0x7fff + last)) >> 16) & 0xffff;
    return (x == x) ? rounded : (((bits >> 16) & 0xffff) | 0x40);
}

inline void store(bf16* p, vec x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
    *(loose_half_ivec*)p = __builtin_convertvector(narrow_bits(x), half_ivec);
#endif
}

inline void store_first(bf16* p, vec x, int64_t n) {
    if (n >= LANES) return store(p, x);
    bf16 parts[LANES];
    store(parts, x);
    for (int64_t i = 0; i < n; i++) p[i] = parts[i];
}

inline void stream_first(bf16* p, vec x, int64_t n) { store_first(p, x, n); }

inline void stream(bf16* p, vec x, vec y) {
#if defined(__AVX512BF16__)
    if ((uintptr_t)p % BYTES == 0) return _mm512_stream_si512((__m512i*)p, (__m512i)_mm512_cvtne2ps_pbh(y, x));
#endif
    store(p, x), store(p + LANES, y);
}

inline vec load(const bf16* p) { return as_float(__builtin_convertvector(*(const loose_half_ivec*)p, ivec) << 16); }
inline vec load_first(const bf16* p, int64_t n) {
    if (n >= LANES) return load(p);
    bf16 parts[LANES] = {};
    for (int64_t i = 0; i < n; i++) parts[i] = p[i];
    return load(parts);
}

// Neighbouring lanes change places.
inline vec swap_pairs(vec x) {
#if defined(__AVX512F__)
    return _mm512_permute_ps(x, 0b10110001);
#elif defined(__AVX2__)
    return _mm256_permute_ps(x, 0b10110001);
#elif defined(__clang__)
    return __builtin_shufflevector(x, x, 1, 0, 3, 2);
#else
    return __builtin_shuffle(x, ivec{1, 0, 3, 2});
#endif
}

template <int STEP, size_t... I>
inline void swap_blocks(vec& x, vec& y, std::index_sequence<I...>) {
    const vec a = x, b = y;
    x = __builtin_shufflevector(a, b, (I & STEP ? LANES + I - STEP : I)...);
    y = __builtin_shufflevector(a, b, (I & STEP ? LANES + I : I + STEP)...);
}

// Row i, lane j changes places with row j, lane i: blocks of 1, 2, 4 and so on beside the diagonal, in this order.
template <int STEP = 1>
inline void transpose(vec (&rows)[LANES]) {
    UNROLL for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) swap_blocks<STEP>(rows[i], rows[i + STEP], std::make_index_sequence<LANES>());
    if constexpr (2 * STEP < LANES) transpose<2 * STEP>(rows);
}

inline float sum(vec x) {
    typedef float four __attribute__((vector_size(16)));
    four total{}, parts[BYTES / 16];
    memcpy(parts, &x, BYTES);
    UNROLL for (int i = 0; i < BYTES / 16; i++) total = total + parts[i];
    return (total[0] + total[1]) + (total[2] + total[3]);
}

inline float largest(vec x) {
    typedef float four __attribute__((vector_size(16)));
    four parts[BYTES / 16];
    memcpy(parts, &x, BYTES);
    UNROLL for (int i = 1; i < BYTES / 16; i++) parts[0] = parts[i] > parts[0] ? parts[i] : parts[0];
    const four most = parts[0];
    const float a = most[0] > most[1] ? most[0] : most[1], b = most[2] > most[3] ? most[2] : most[3];
    return a > b ? a : b;
}

// 2^f for f in [-1/2, 1/2].
inline vec power_of_rest(vec f) {
    vec y = all(1.535336196e-4f);
    y = y * f + 1.339887502e-3f;
    y = y * f + 9.618436918e-3f;
    y = y * f + 5.550332367e-2f;
    y = y * f + 2.402264774e-1f;
    y = y * f + 6.931471825e-1f;
    return y * f + 1.0f;
}

// 2^x for x below 127: x is rounded to an integer, which becomes the exponent, and a polynomial gives 2^f for the rest f
// in [-1/2, 1/2], with an error of 2e-9 before rounding. Below -126 the result is 2^-126; NaN stays NaN.
inline vec exp2(vec x) {
#if defined(__AVX512F__)
    const vec whole = _mm512_roundscale_ps(larger(x, all(-126.0f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(power_of_rest(larger(x, all(-126.0f)) - whole), whole);
#else
    // 1.5 * 2^23 + 127: adding it leaves an integer in the low bits, with the offset of exponents.
    const vec magic = all(12583039.0f);
    x = larger(x, all(-126.0f));
    const vec shifted = x + magic;
    return power_of_rest(x - (shifted - magic)) * as_float(as_int(shifted) << 23);
#endif
}

// Scratch memory of a thread: new pages for every call would take longer than the computation. It is freed when the
// thread ends. A destructor would do so too, but needs C++'s own library.
struct Scratch {
    char* data;
    size_t size, used;
    bool ends;  // whether the system knows what to call at the end
};
inline thread_local Scratch scratch;
inline void free_scratch(void*) { free(scratch.data), scratch = {}; }
constexpr size_t KEPT_BYTES = size_t(16) << 20;

inline bool reserve(size_t bytes) {
    scratch.used = 0;
    if (scratch.size >= bytes) return true;
    free(scratch.data);
    bytes = (bytes + 63) / 64 * 64;
    scratch.data = static_cast<char*>(aligned_alloc(64, bytes));
    scratch.size = scratch.data ? bytes : 0;
    if (!scratch.ends) at_end_of_thread(free_scratch), scratch.ends = true;
    return scratch.data != nullptr;
}

inline void give_back() {
    if (scratch.size <= KEPT_BYTES) return;
    free(scratch.data);
    scratch.data = nullptr, scratch.size = 0;
}

template <class Item>
constexpr size_t space(size_t items) {
    return (items * sizeof(Item) + 63) / 64 * 64;
}

template <class Item>
inline Item* take(size_t items) {
    Item* taken = reinterpret_cast<Item*>(scratch.data + scratch.used);
    scratch.used += space<Item>(items);
    return taken;
}

// Tasks that threads take one after another.
struct Queue {
    int64_t next = 0;
    int failed = 0;

    int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
    void fail() { __atomic_store_n(&failed, 1, __ATOMIC_RELAXED); }
};
