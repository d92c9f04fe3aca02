// Rotation of queries and keys by rotary angles in one pass; the halves of a head turn together (GPT-NeoX's layout).

#pragma once

#include "kernels.h"
#include "simd.h"

// Eight or four items: halves of heads are narrower than the widest vectors.
typedef float eight __attribute__((vector_size(32)));
typedef float four __attribute__((vector_size(16)));
typedef float loose_eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef float loose_four __attribute__((vector_size(16), aligned(4), may_alias));

inline void read(eight& x, const float* p) { x = *(const loose_eight*)p; }
inline void read(four& x, const float* p) { x = *(const loose_four*)p; }
inline void write(float* p, const eight& x) { *(loose_eight*)p = x; }
inline void write(float* p, const four& x) { *(loose_four*)p = x; }
#if defined(__AVX512BF16__)
inline void read(eight& x, const bf16* p) {
    x = (eight)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline void read(four& x, const bf16* p) {
    x = (four)_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p)), 16);
}
inline void write(bf16* p, const eight& x) { _mm_storeu_si128((__m128i*)p, (__m128i)_mm256_cvtneps_pbh(x)); }
inline void write(bf16* p, const four& x) { _mm_storel_epi64((__m128i*)p, (__m128i)_mm_cvtneps_pbh(x)); }
#endif

template <class V, class Item>
inline void rotate_rows(const Rotation& call, int64_t begin, int64_t end) {
    constexpr int64_t N = sizeof(V) / sizeof(float);
    const int64_t half = call.width / 2;
    const float factor = float(call.factor), direction = call.back ? -factor : factor;
    for (int64_t row = begin; row < end; row++) {
        const float *cosine = call.cosine + row * half, *sine = call.sine + row * half;
        const Item* x = (const Item*)call.x + row * call.x_stride;
        Item* y = (Item*)call.y + row * call.y_stride;
        for (int64_t head = 0; head < call.heads; head++, x += call.width, y += call.width)
            for (int64_t d = 0; d < half; d += N) {
                V c, s, first, second;
                read(c, cosine + d), read(s, sine + d), read(first, x + d), read(second, x + half + d);
                c = c * factor, s = s * direction;
                write(y + d, first * c - second * s);
                write(y + half + d, second * c + first * s);
            }
    }
}

struct RotationWork : Queue {
    static constexpr int64_t BLOCK = 128;
    const Rotation& call;

    explicit RotationWork(const Rotation& call) : call(call) {}

    template <class Item>
    void run() {
        for (int64_t row = take() * BLOCK; row < call.rows; row = take() * BLOCK)
            if (call.width % 16)
                rotate_rows<four, Item>(call, row, least(call.rows, row + BLOCK));
            else
                rotate_rows<eight, Item>(call, row, least(call.rows, row + BLOCK));
    }
};

inline int rotate(const Rotation* call, int64_t threads, Parallel parallel) {
    RotationWork work(*call);
    auto thread = [](void* data) {
        auto& work = *static_cast<RotationWork*>(data);
#if defined(__AVX512BF16__)
        if (work.call.type == BFLOAT16) return work.run<bf16>();
#endif
        work.run<float>();
    };
    if (threads > 1 && parallel)
        parallel(thread, &work, unsigned(threads), 0);
    else
        thread(&work);
    return 0;
}
