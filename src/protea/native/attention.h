// Attention within the sequences of a packed batch, forward and backward, in float32.
//
// The lanes of a vector hold queries, so that softmax works within each lane. Scores are therefore stored transposed,
// with one vector for each key and block of queries. One thread computes each row of a result, in an order that depends
// only on the length of the sequence, so the bits depend neither on threads nor on other sequences. The softmax in
// blocks follows FlashAttention (Dao et al. 2022), the backward pass follows its second version (Dao 2023).
//
// Shapes: L tokens of one sequence, K head width, B blocks of LANES queries.

#pragma once

#include "kernels.h"
#include "simd.h"

constexpr int FORWARD_KEYS = 128;  // keys with scores in memory at once: 16 KB, a part of a first-level cache
constexpr int BACKWARD_KEYS = 64;
constexpr int KEY_TILE = REGISTERS / 4;      // keys of a product whose sums fill half of the registers
constexpr int TWIN_TILE = REGISTERS == 32 ? 4 : KEY_TILE;  // keys of the two products of the backward pass
constexpr int MAX_WIDTH = 256;
constexpr int64_t TASK_ROWS = 256;           // rows of a task if threads share a sequence
constexpr float LOG2_E = 1.4426950408889634f;

// Everything of one head of one sequence.
struct Head {
    int64_t sequence, head, q0, lq, k0, lk;

    Head(const Attention& call, int64_t b, int64_t h) : sequence(b), head(h) {
        q0 = call.cu_q[b], lq = call.cu_q[b + 1] - q0;
        k0 = call.cu_k[b], lk = call.cu_k[b + 1] - k0;
    }
};

// The factor on scores in two parts. Scores stay as the products gave them until the largest has been subtracted, which
// leaves no rounding of large scores; a sign, or 0, must be in the queries before the largest is found.
struct Factor {
    float sign, size;

    explicit Factor(double scale) : sign(float(scale > 0) - float(scale < 0)), size(1.0f) {
        if (scale != 0) size = __builtin_fabsf(float(scale));
        if (scale != scale) sign = float(scale);
    }
};

inline float* lse_of(const Attention& call, const Head& task, int64_t row) {
    return call.lse + task.head * call.cu_q[call.sequences] + task.q0 + row;
}

// Transpose rows [n, K] times a factor to columns [K, B * LANES]; zeros fill the lanes without a row.
template <int B>
inline void to_columns(float* to, const float* from, int64_t stride, int64_t n, int64_t width, float factor) {
    for (int64_t row = 0; row < B * LANES; row += LANES)
        for (int64_t d = 0; d < width; d += LANES) {
            vec part[LANES];
            UNROLL for (int i = 0; i < LANES; i++)
                part[i] = row + i < n ? load_first(from + (row + i) * stride + d, width - d) * factor : vec{};
            transpose(part);
            for (int64_t i = 0; i < least(LANES, width - d); i++) store(to + (d + i) * B * LANES + row, part[i]);
        }
}

// Copy rows [n, K] to rows of `wide` items; zeros fill the rest, up to `size` rows.
inline void to_rows(float* to, const float* from, int64_t stride, int64_t n, int64_t size, int64_t width, int64_t wide) {
    for (int64_t row = 0; row < size; row++, to += wide)
        for (int64_t d = 0; d < wide; d += LANES)
            store(to + d, row < n ? load_first(from + row * stride + d, width - d) : vec{});
}

// Sums [K, B * LANES] times one factor for each lane, to rows [n, K].
template <int B, class To>
inline void from_columns(To* to, const float* sums, const float* factor, int64_t stride, int64_t n, int64_t width) {
    for (int64_t row = 0; row < n; row += LANES)
        for (int64_t d = 0; d < width; d += LANES) {
            vec part[LANES];
            UNROLL for (int i = 0; i < LANES; i++)
                part[i] = d + i < width ? load(sums + (d + i) * B * LANES + row) * load(factor + row) : vec{};
            transpose(part);
            for (int64_t i = 0; i < least(LANES, n - row); i++)
                stream_first(to + (row + i) * stride + d, part[i], width - d);
        }
}

// Products of N keys, [N, wide], with B * LANES queries, [K, B * LANES].
template <int B, int N>
inline void dot(vec (&out)[N][B], const float* x, const float* keys, int64_t wide, int64_t width) {
    UNROLL for (int t = 0; t < N; t++) UNROLL for (int b = 0; b < B; b++) out[t][b] = vec{};
    for (int64_t d = 0; d < width; d++, x += B * LANES) {
        vec columns[B];
        UNROLL for (int b = 0; b < B; b++) columns[b] = load(x + b * LANES);
        UNROLL for (int t = 0; t < N; t++) {
            const vec key = all(keys[t * wide + d]);
            UNROLL for (int b = 0; b < B; b++) out[t][b] = out[t][b] + columns[b] * key;
        }
    }
}

// sums [K, B * LANES] += x [n, B * LANES] times rows [n, wide]: a sum over keys. K is a multiple of KEY_TILE. What is
// added is summed apart: shorter sums are more exact.
template <int B>
inline void add_over_keys(float* sums, const float* x, const float* rows, int64_t n, int64_t wide, int64_t width) {
    constexpr int N = KEY_TILE;
    for (int64_t d = 0; d < width; d += N) {
        vec sum[N][B];
        UNROLL for (int t = 0; t < N; t++)
            UNROLL for (int b = 0; b < B; b++) sum[t][b] = vec{};
        for (int64_t j = 0; j < n; j++) {
            vec weights[B];
            UNROLL for (int b = 0; b < B; b++) weights[b] = load(x + (j * B + b) * LANES);
            UNROLL for (int t = 0; t < N; t++) {
                const vec value = all(rows[j * wide + d + t]);
                UNROLL for (int b = 0; b < B; b++) sum[t][b] = sum[t][b] + weights[b] * value;
            }
        }
        UNROLL for (int t = 0; t < N; t++)
            UNROLL for (int b = 0; b < B; b++) {
                float* at = sums + ((d + t) * B + b) * LANES;
                store(at, load(at) + sum[t][b]);
            }
    }
}

// The part of add_over_queries for C vectors of columns and N keys.
template <int B, int C, int N>
inline void add_over_queries_at(float* sums, const float* x, const float* rows, int64_t wide) {
    vec sum[N][C];
    UNROLL for (int t = 0; t < N; t++) UNROLL for (int c = 0; c < C; c++) sum[t][c] = vec{};
    for (int64_t i = 0; i < B * LANES; i++) {
        vec columns[C];
        UNROLL for (int c = 0; c < C; c++) columns[c] = load(rows + i * wide + c * LANES);
        UNROLL for (int t = 0; t < N; t++) {
            const vec weight = all(x[t * B * LANES + i]);
            UNROLL for (int c = 0; c < C; c++) sum[t][c] = sum[t][c] + weight * columns[c];
        }
    }
    UNROLL for (int t = 0; t < N; t++) {
        UNROLL for (int c = 0; c < C; c++) {
            float* at = sums + t * wide + c * LANES;
            store(at, load(at) + sum[t][c]);
        }
    }
}

// sums [keys, wide] += x [keys, B * LANES] times rows [B * LANES, wide]: a sum over queries.
template <int B>
inline void add_over_queries(float* sums, const float* x, const float* rows, int64_t keys, int64_t wide) {
    for (int64_t j = 0; j < keys; j += KEY_TILE) {
        int64_t d = 0;
        for (; d + 2 * LANES <= wide; d += 2 * LANES)
            add_over_queries_at<B, 2, KEY_TILE>(sums + j * wide + d, x + j * B * LANES, rows + d, wide);
        if (d < wide) add_over_queries_at<B, 1, KEY_TILE>(sums + j * wide + d, x + j * B * LANES, rows + d, wide);
    }
}

// ---- Forward ----

// Scale the scores of n queries from `row` on with keys first:first + count, and add the bias.
template <int B>
inline void add_bias(const Attention& call, const Head& task, float* scores, int64_t row, int64_t n, int64_t first,
                     int64_t count, float size) {
    const float* bias = call.bias + task.head * call.bias_head_stride + row * call.bias_row_stride +
                        first * call.bias_column_stride;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < count; j++)
            scores[j * B * LANES + i] = scores[j * B * LANES + i] * size +
                                        bias[i * call.bias_row_stride + j * call.bias_column_stride];
}

template <int B>
void forward_block(const Attention& call, const Head& task, int64_t row, int64_t n, const float* keys,
                   const float* values) {
    const int64_t width = call.width, wide = rounded_up(width, LANES);
    alignas(64) float scores[FORWARD_KEYS * B * LANES];
    alignas(64) float q[MAX_WIDTH * B * LANES], sums[MAX_WIDTH * B * LANES];
    const Factor factor(call.scale);
    const float times = (call.bias ? 1.0f : factor.size) * LOG2_E;
    const float* from = (const float*)call.q + (task.q0 + row) * call.q_stride + task.head * width;
    to_columns<B>(q, from, call.q_stride, n, width, factor.sign);
    memset(sums, 0, sizeof(float) * width * B * LANES);

    vec largest[B], total[B];
    UNROLL for (int b = 0; b < B; b++) largest[b] = all(-FLT_MAX), total[b] = vec{};  // -inf - -inf is NaN
    for (int64_t first = 0; first < task.lk; first += FORWARD_KEYS) {
        const int64_t count = least(FORWARD_KEYS, task.lk - first);
        vec before[B];
        UNROLL for (int b = 0; b < B; b++) before[b] = largest[b];
        for (int64_t j = 0; j < count; j += KEY_TILE) {
            vec tile[KEY_TILE][B];
            dot<B, KEY_TILE>(tile, q, keys + (first + j) * wide, wide, width);
            UNROLL for (int t = 0; t < KEY_TILE; t++) {
                UNROLL for (int b = 0; b < B; b++) {
                    store(scores + ((j + t) * B + b) * LANES, tile[t][b]);
                    // Keys behind the last repeat it, so they change no maximum.
                    largest[b] = larger(tile[t][b], largest[b]);
                }
            }
        }
        if (call.bias) {
            add_bias<B>(call, task, scores, row, n, first, count, factor.size);
            UNROLL for (int b = 0; b < B; b++) {
                largest[b] = before[b];
                for (int64_t j = 0; j < count; j++) largest[b] = larger(load(scores + (j * B + b) * LANES), largest[b]);
            }
        }
        UNROLL for (int b = 0; b < B; b++) {
            if (first == 0) continue;
            const vec rescale = exp2((before[b] - largest[b]) * times);
            total[b] = total[b] * rescale;
            for (int64_t d = 0; d < width; d++) {
                float* at = sums + (d * B + b) * LANES;
                store(at, load(at) * rescale);
            }
        }
        vec part[B] = {};
        for (int64_t j = 0; j < count; j++) {
            UNROLL for (int b = 0; b < B; b++) {
                float* at = scores + (j * B + b) * LANES;
                // The largest score must cancel exactly, so this is not one operation.
                const vec weight = exp2((load(at) - largest[b]) * times);
                part[b] = part[b] + weight;
                store(at, weight);
            }
        }
        UNROLL for (int b = 0; b < B; b++) total[b] = total[b] + part[b];
        add_over_keys<B>(sums, scores, values + first * wide, count, wide, width);
    }

    alignas(64) float inverse[B * LANES], totals[B * LANES], shifts[B * LANES];
    for (int b = 0; b < B; b++) {
        store(inverse + b * LANES, 1.0f / total[b]);
        store(totals + b * LANES, total[b]);
        store(shifts + b * LANES, largest[b]);
    }
    if (call.lse) {
        float* lse = lse_of(call, task, row);
        for (int64_t i = 0; i < n; i++) lse[i] = shifts[i] + __builtin_logf(totals[i]) / factor.size;
    }
    const int64_t at = (task.q0 + row) * call.out_stride + task.head * width;
    if (call.out_type == BFLOAT16)
        from_columns<B>((bf16*)call.out + at, sums, inverse, call.out_stride, n, width);
    else
        from_columns<B>((float*)call.out + at, sums, inverse, call.out_stride, n, width);
}

bool forward_task(const Attention& call, const Head& task, int64_t begin, int64_t end) {
    const int64_t size = rounded_up(task.lk, KEY_TILE), width = call.width, wide = rounded_up(width, LANES);
    if (!reserve(2 * space<float>(size * wide))) return false;
    float *keys = take<float>(size * wide), *values = take<float>(size * wide);
    to_rows(keys, (const float*)call.k + task.k0 * call.k_stride + task.head * width, call.k_stride, task.lk, task.lk,
            width, wide);
    for (int64_t row = task.lk; row < size; row++)
        memcpy(keys + row * wide, keys + (task.lk - 1) * wide, wide * sizeof(float));
    to_rows(values, (const float*)call.v + task.k0 * call.v_stride + task.head * width, call.v_stride, task.lk, size,
            width, wide);
    for (int64_t row = begin; row < end; row += 2 * LANES) {
        const int64_t n = least(2 * LANES, end - row);
        if (n > LANES)
            forward_block<2>(call, task, row, n, keys, values);
        else
            forward_block<1>(call, task, row, n, keys, values);
    }
    return true;
}

// ---- Backward ----

struct Gathered {  // inputs and sums of a range of keys
    int64_t count;
    const float *keys, *values;  // [size, wide]
    float *dk, *dv;              // [size, wide] sums, or null
    bool queries;                // whether to compute gradients of queries
};

template <int B>
void backward_block(const Attention& call, const Head& task, int64_t row, int64_t n, const Gathered& part) {
    const int64_t width = call.width, wide = rounded_up(width, LANES);
    const int64_t at = (task.q0 + row) * call.heads * width + task.head * width;
    const int64_t stride = call.heads * width;
    alignas(64) float q[MAX_WIDTH * B * LANES], dout[MAX_WIDTH * B * LANES];
    alignas(64) float q_rows[B * LANES * MAX_WIDTH], dout_rows[B * LANES * MAX_WIDTH];
    alignas(64) float weights[BACKWARD_KEYS * B * LANES], slopes[BACKWARD_KEYS * B * LANES];
    alignas(64) float sums[MAX_WIDTH * B * LANES], deltas[B * LANES] = {}, lses[B * LANES] = {}, scales[B * LANES];
    const Factor factor(call.scale);
    const float times = factor.size * LOG2_E;
    const float* from = (const float*)call.q + (task.q0 + row) * call.q_stride + task.head * width;
    const float *out = (const float*)call.out + at, *slope = (const float*)call.dout + at;
    to_columns<B>(q, from, call.q_stride, n, width, factor.sign);
    to_columns<B>(dout, slope, stride, n, width, 1.0f);
    if (part.dk) {
        to_rows(q_rows, from, call.q_stride, n, B * LANES, width, wide);
        to_rows(dout_rows, slope, stride, n, B * LANES, width, wide);
    }
    // In the order of the products below: with one key, the difference of both must be 0.
    to_columns<B>(sums, out, stride, n, width, 1.0f);
    UNROLL for (int b = 0; b < B; b++) {
        vec total{};
        for (int64_t d = 0; d < width; d++)
            total = total + load(dout + (d * B + b) * LANES) * load(sums + (d * B + b) * LANES);
        store(deltas + b * LANES, total);
    }
    memcpy(lses, lse_of(call, task, row), n * sizeof(float));
    memset(sums, 0, sizeof(float) * width * B * LANES);

    for (int64_t first = 0; first < part.count; first += BACKWARD_KEYS) {
        const int64_t count = least(BACKWARD_KEYS, part.count - first), size = rounded_up(count, KEY_TILE);
        // One product after the other: each fills half of the registers with its sums, which are not waited for.
        for (int64_t j = 0; j < size; j += TWIN_TILE) {
            vec tile[TWIN_TILE][B];
            float *p = weights + j * B * LANES, *ds = slopes + j * B * LANES;
            dot<B, TWIN_TILE>(tile, q, part.keys + (first + j) * wide, wide, width);
            UNROLL for (int t = 0; t < TWIN_TILE; t++)
                UNROLL for (int b = 0; b < B; b++)
                    store(p + (t * B + b) * LANES, exp2((tile[t][b] - load(lses + b * LANES)) * times));
            dot<B, TWIN_TILE>(tile, dout, part.values + (first + j) * wide, wide, width);
            UNROLL for (int t = 0; t < TWIN_TILE; t++)
                UNROLL for (int b = 0; b < B; b++) {
                    const int at = (t * B + b) * LANES;
                    store(ds + at, load(p + at) * (tile[t][b] - load(deltas + b * LANES)));
                }
        }
        if (part.dk) {
            add_over_queries<B>(part.dv + first * wide, weights, dout_rows, size, wide);
            add_over_queries<B>(part.dk + first * wide, slopes, q_rows, size, wide);
        }
        if (part.queries) add_over_keys<B>(sums, slopes, part.keys + first * wide, count, wide, width);
    }
    if (!part.queries) return;
    for (float& scale : scales) scale = float(call.scale);
    from_columns<B>((float*)call.dq + at, sums, scales, stride, n, width);
}

// Gradients of queries q_begin:q_end, or of keys and values k_begin:k_end, or of both if the ranges hold all rows.
bool backward_task(const Attention& call, const Head& task, int64_t q_begin, int64_t q_end, int64_t k_begin,
                   int64_t k_end, bool queries, bool keys) {
    const int64_t count = k_end - k_begin, size = rounded_up(count, KEY_TILE), width = call.width;
    const int64_t wide = rounded_up(width, LANES), stride = call.heads * width;
    if (!reserve(4 * space<float>(size * wide))) return false;
    float *k = take<float>(size * wide), *v = take<float>(size * wide);
    to_rows(k, (const float*)call.k + (task.k0 + k_begin) * call.k_stride + task.head * width, call.k_stride, count,
            size, width, wide);
    to_rows(v, (const float*)call.v + (task.k0 + k_begin) * call.v_stride + task.head * width, call.v_stride, count,
            size, width, wide);
    Gathered part{count, k, v, nullptr, nullptr, queries};
    if (keys) {
        part.dk = take<float>(size * wide), part.dv = take<float>(size * wide);
        memset(part.dk, 0, size * wide * sizeof(float));
        memset(part.dv, 0, size * wide * sizeof(float));
    }
    for (int64_t row = q_begin; row < q_end; row += 2 * LANES) {
        const int64_t n = least(2 * LANES, q_end - row);
        if (n > LANES)
            backward_block<2>(call, task, row, n, part);
        else
            backward_block<1>(call, task, row, n, part);
    }
    if (!keys) return true;
    const int64_t at = (task.k0 + k_begin) * stride + task.head * width;
    for (int64_t j = 0; j < count; j++)
        for (int64_t d = 0; d < width; d += LANES) {
            store_first((float*)call.dk + at + j * stride + d, load(part.dk + j * wide + d) * float(call.scale),
                        width - d);
            store_first((float*)call.dv + at + j * stride + d, load(part.dv + j * wide + d), width - d);
        }
    return true;
}
