// Products in int8, where the processor adds four products of bytes in one instruction.
//
// Weights are signed, inputs unsigned. GROUP weights of an output share a scale; GROUP inputs of a row share a scale and a
// zero, found while the row is prepared. An unusual value thus costs only its neighbours precision. Sums of a group are
// exact integers; they are added up over the groups in float32, in one order: the bits of a row depend on that row alone.

#pragma once

#include "simd.h"

#if defined(__AVX512VNNI__)
#define MULTIPLIES_BYTES
#define ENCODING ""
#elif defined(__AVXVNNI__)
#define MULTIPLIES_BYTES
#define ENCODING "%{vex%} "
#endif

constexpr int64_t GROUP = 128;

#if defined(MULTIPLIES_BYTES)

// A panel as `Wide32` and `Pairs` in linear.h are. A group of a row begins with its zero and its scale. A group of a panel
// begins with an item for each output: in the low half the negative sum of the weights, which times the zero is where the
// sum of products begins; in the high half the scale, a bfloat16.
struct Bytes {
    using Stored = uint8_t;
    using Item = uint32_t;
    using Sum = ivec;
    static constexpr int64_t STEP = 4, CHUNK = GROUP / STEP, DEPTH = 5120, HEAD = 1, X_HEAD = 2;

    static Sum weights(const Item* p) { return *(const loose_ivec*)p; }
    static Sum repeat(Item x) { return int(x) - Sum{}; }
    // Instructions by name: of intrinsics, GCC 12 copies each sum to another register and to memory in every step.
    static Sum add(Sum sum, Sum weights, Sum item) {
        __asm__(ENCODING "vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(item), "v"(weights));
        return sum;
    }
    static Sum begin(const Item* x, const Item* panel) {
        Sum sum{};
        __asm__(ENCODING "vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(repeat(*x)), "v"(weights(panel)));
        return sum;
    }
    static vec end(vec total, Sum sum, const Item* x, const Item* panel) {
        float scale;
        memcpy(&scale, x + 1, sizeof scale);
        return total + __builtin_convertvector(sum, vec) * as_float(weights(panel) & ~0xffff) * scale;
    }
};

// A row of n inputs in bytes: x is about (byte - zero) * scale. The scale is NaN if an input is not finite.
template <class From>
inline void to_bytes(uint32_t* to, const From* x, int64_t n) {
    typedef uint8_t quarter __attribute__((vector_size(LANES)));
    constexpr int PARTS = GROUP / LANES;
    constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    for (int64_t at = 0; at < n; at += GROUP, to += Bytes::CHUNK + Bytes::X_HEAD) {
        vec part[PARTS], high, low, finite{};
        UNROLL for (int i = 0; i < PARTS; i++) {
            part[i] = load_first(x + at + i * LANES, most(0, n - at - i * LANES));
            high = i ? larger(part[i], high) : part[i];
            low = i ? larger(-part[i], low) : -part[i];
            finite = part[i] * 0.0f + finite;
        }
        const float top = largest(high), bottom = -largest(low), far = top > -bottom ? top : -bottom;
        float scale = top / 255.0f - bottom / 255.0f;
        // The zero has 16 bits.
        scale = scale > far / 32000.0f ? scale : far / 32000.0f;
        scale = scale > 1e-30f ? scale : 1e-30f;
        float inverse = 1.0f / scale, zero = __builtin_rintf(-bottom * inverse);
        if (sum(finite) != 0.0f) scale = __builtin_nanf(""), inverse = zero = 0.0f;
        to[0] = uint16_t(int16_t(zero));
        memcpy(to + 1, &scale, sizeof scale);
        UNROLL for (int i = 0; i < PARTS; i++) {
            ivec y = as_int(part[i] * inverse + (zero + MAGIC)) - as_int(all(MAGIC));
            y = y > 0 ? y : 0;
            y = y < 255 ? y : 255;
            const quarter bytes = __builtin_convertvector(y, quarter);
            memcpy(to + Bytes::X_HEAD + i * LANES / 4, &bytes, sizeof bytes);
        }
    }
}

#endif

// The bytes of a weight whose outputs fill all panels.
inline int64_t bytes_of_int8(int64_t outputs, int64_t inputs) {
    return outputs * (rounded_up(inputs, 4) + (inputs + GROUP - 1) / GROUP * 4);
}

// The scale of a group of weights: the largest becomes 127. It is 0 without weights, and NaN if one is not finite.
inline float scale_of(const float* from, int64_t count, int64_t stride) {
    float most = 0, finite = 0;
    for (int64_t d = 0; d < count; d++) {
        const float size = __builtin_fabsf(from[d * stride]);
        most = size > most ? size : most;
        finite += size * 0.0f;
    }
    most = finite == 0.0f ? most / 127.0f : __builtin_nanf("");
    uint32_t bits;
    memcpy(&bits, &most, sizeof bits);
    bits = (bits + (finite == 0.0f ? 0xffff : 0)) & ~0xffffu;  // up, so that none exceeds 127
    memcpy(&most, &bits, sizeof bits);
    return most;
}

// Panels of `wide` outputs, of these group by group.
inline void pack_int8(int8_t* to, const float* weight, int64_t outputs, int64_t inputs, int64_t output_stride,
                      int64_t input_stride, int64_t wide) {
    for (int64_t first = 0; first < outputs; first += wide)
        for (int64_t start = 0; start < inputs; start += GROUP) {
            const int64_t there = least(GROUP, inputs - start), count = rounded_up(there, 4);
            memset(to, 0, size_t((count + 4) * wide));
            for (int64_t n = 0; n < least(wide, outputs - first); n++) {
                const float* from = weight + (first + n) * output_stride + start * input_stride;
                const float scale = scale_of(from, there, input_stride), inverse = scale > 0 ? 1.0f / scale : 0.0f;
                int32_t total = 0;
                for (int64_t d = 0; d < (scale > 0 ? there : 0); d++) {
                    const int8_t item = int8_t(__builtin_rintf(from[d * input_stride] * inverse));
                    total += item;
                    to[(d / 4 + 1) * wide * 4 + n * 4 + d % 4] = item;
                }
                uint32_t head;
                memcpy(&head, &scale, sizeof head);
                head |= uint16_t(int16_t(-total));
                memcpy(to + n * 4, &head, sizeof head);
            }
            to += (count + 4) * wide;
        }
}

// The weights that are multiplied: `pack_int8` has rounded them.
inline void unpack_int8(float* to, const int8_t* packed, int64_t outputs, int64_t inputs, int64_t wide) {
    for (int64_t first = 0; first < outputs; first += wide)
        for (int64_t start = 0; start < inputs; start += GROUP) {
            const int64_t there = least(GROUP, inputs - start);
            for (int64_t n = 0; n < least(wide, outputs - first); n++) {
                uint32_t head;
                memcpy(&head, packed + n * 4, sizeof head);
                head &= ~0xffffu;
                float scale;
                memcpy(&scale, &head, sizeof scale);
                for (int64_t d = 0; d < there; d++)
                    to[(first + n) * inputs + start + d] = scale * packed[(d / 4 + 1) * wide * 4 + n * 4 + d % 4];
            }
            packed += (rounded_up(there, 4) + 4) * wide;
        }
}
