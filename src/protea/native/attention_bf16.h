// Attention in bfloat16, forward and backward, for AVX-512 BF16, in the order of attention.h.
//
// One instruction multiplies pairs of bfloat16 and adds both products to a float32; a "pair" below is two neighbours
// along the summed dimension, in 32 bits. Scores, softmax, log-sum-exp and all sums are float32. Probabilities and
// their gradients are rounded to bfloat16 only as factors of the next product.

#pragma once

#include "attention.h"

#if defined(__AVX512BF16__)

namespace narrow {

constexpr int KEY_TILE = 8;       // keys are padded with zeros to a multiple of this
constexpr int FETCHED_ROWS = 16;  // distance of prefetching, in rows

inline int64_t padded(int64_t n) { return rounded_up(n, KEY_TILE); }
inline __m512bh as_pairs(__m512i x) { return (__m512bh)x; }
inline __m512bh load_pairs(const pair* p) { return as_pairs(_mm512_loadu_si512(p)); }
inline __m512bh repeat(pair x) { return as_pairs(_mm512_set1_epi32(int(x))); }

// ---- Rearranging ----

// Prefetch a row: the rows of one head are so far apart that processors do not predict the next one.
inline void fetch(const bf16* row, int width) {
    for (int d = 0; d < width; d += 32) _mm_prefetch((const char*)(row + d), _MM_HINT_T0);
    _mm_prefetch((const char*)(row + width - 1), _MM_HINT_T0);
}

// Transpose 4 rows and 4 columns within each 128 bits.
inline void transpose(__m512i (&x)[4]) {
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    x[0] = _mm512_unpacklo_epi64(a, c), x[1] = _mm512_unpackhi_epi64(a, c);
    x[2] = _mm512_unpacklo_epi64(b, d), x[3] = _mm512_unpackhi_epi64(b, d);
}

inline __m128i load_8(const bf16* from, bool there) {
    return there ? _mm_loadu_si128((const __m128i*)from) : _mm_setzero_si128();
}

// [n, K] to pairs of neighbouring columns, with four rows side by side: [size / 4, K / 2, 4], `apart` pairs apart.
// Copies of the last row fill the rest: they change no maximum and cause no new overflow.
void four_rows(pair* to, int apart, const bf16* from, int64_t stride, int64_t n, int64_t size, int width) {
    for (int64_t row = 0; row < size; row += 4) {
        const bf16* at[4];
        UNROLL for (int i = 0; i < 4; i++) {
            at[i] = from + least(row + i, n - 1) * stride;
            fetch(from + least(row + i + FETCHED_ROWS, n - 1) * stride, width);
        }
        for (int d = 0; d < width; d += 8, to += 4 * apart) {
            __m512i x[4];
            UNROLL for (int i = 0; i < 4; i++) x[i] = _mm512_castsi128_si512(load_8(at[i] + d, true));
            transpose(x);
            UNROLL for (int c = 0; c < 4; c++)
                _mm_storeu_si128((__m128i*)(to + c * apart), _mm512_castsi512_si128(x[c]));
        }
    }
}

// [n, K] to pairs of neighbouring rows, [size / 2, K].
void pair_rows(pair* to, const bf16* from, int64_t stride, int64_t n, int64_t size, int width) {
    for (int64_t row = 0; row < size; row += 2, to += width) {
        fetch(from + least(row + FETCHED_ROWS, n - 1) * stride, width);
        fetch(from + least(row + 1 + FETCHED_ROWS, n - 1) * stride, width);
        for (int d = 0; d < width; d += 8) {
            __m256i low = _mm256_setzero_si256(), high = low;
            if (row < n) low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + row * stride + d)));
            if (row + 1 < n)
                high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + (row + 1) * stride + d)));
            _mm256_storeu_si256((__m256i*)(to + d), _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
        }
    }
}

// [n, K] to pairs of neighbouring columns, with one row in each lane, [K / 2, B * 16].
template <int B>
void pair_columns(pair* to, const bf16* from, int64_t stride, int n, int width) {
    for (int row = 0; row < n; row++) fetch(from + row * stride, width);
    for (int b = 0; b < B; b++, from += LANES * stride, n -= LANES) {
        for (int d = 0; d < width; d += 8) {
            __m512i x[4];
            UNROLL for (int i = 0; i < 4; i++) {
                x[i] = _mm512_castsi128_si512(load_8(from + i * stride + d, i < n));
                x[i] = _mm512_inserti32x4(x[i], load_8(from + (i + 4) * stride + d, i + 4 < n), 1);
                x[i] = _mm512_inserti32x4(x[i], load_8(from + (i + 8) * stride + d, i + 8 < n), 2);
                x[i] = _mm512_inserti32x4(x[i], load_8(from + (i + 12) * stride + d, i + 12 < n), 3);
            }
            transpose(x);
            UNROLL for (int c = 0; c < 4; c++) _mm512_store_si512(to + ((d / 2 + c) * B + b) * LANES, x[c]);
        }
    }
}

// Sums [K, B * 16] times one factor for each lane, rounded, to rows [n, K].
template <int B>
void store_columns(bf16* to, const float* sums, const __m512 (&factor)[B], int64_t stride, int n, int width) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    UNROLL for (int b = 0; b < B; b++, to += LANES * stride, n -= LANES) {
        for (int d = 0; d < width; d += 8) {
            __m512i x[4];
            UNROLL for (int c = 0; c < 4; c++) {
                const float* at = sums + ((d + 2 * c) * B + b) * LANES;
                const __m512 low = _mm512_mul_ps(_mm512_load_ps(at), factor[b]);
                const __m512 high = _mm512_mul_ps(_mm512_load_ps(at + B * LANES), factor[b]);
                x[c] = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            }
            transpose(x);
            alignas(64) __m128i rows[LANES];
            UNROLL for (int i = 0; i < 4; i++) _mm512_store_si512(rows + 4 * i, x[i]);
            for (int i = 0; i < LANES && i < n; i++)
                _mm_storeu_si128((__m128i*)(to + i * stride + d), rows[i % 4 * 4 + i / 4]);
        }
    }
}

// Sums [n, K] times a factor, rounded, to rows with a stride.
void store_rows(bf16* to, const float* sums, float factor, int64_t stride, int64_t n, int width) {
    for (int64_t row = 0; row < n; row++)
        for (int d = 0; d < width; d += 8) {
            const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(sums + row * width + d), _mm256_set1_ps(factor));
            _mm_storeu_si128((__m128i*)(to + row * stride + d), (__m128i)_mm256_cvtneps_pbh(x));
        }
}

// ---- Products ----

// Products of 8 keys with B * 16 queries: x [K / 2, B * 16] and four_rows [2, K / 2, 4], both pairs of columns.
template <int B>
inline void dot(__m512 (&out)[KEY_TILE][B], const pair* x, const pair* rows, int half) {
    UNROLL for (int t = 0; t < KEY_TILE; t++) UNROLL for (int b = 0; b < B; b++) out[t][b] = _mm512_setzero_ps();
    const pair* more = rows + 4 * half;
    for (int d = 0; d < half; d++, x += B * LANES, rows += 4, more += 4) {
        __m512bh columns[B];
        UNROLL for (int b = 0; b < B; b++) columns[b] = load_pairs(x + b * LANES);
        UNROLL for (int t = 0; t < KEY_TILE; t++) {
            const __m512bh key = repeat(t < 4 ? rows[t] : more[t - 4]);
            UNROLL for (int b = 0; b < B; b++) out[t][b] = _mm512_dpbf16_ps(out[t][b], columns[b], key);
        }
    }
}

// The same for 4 keys and 4 values: x and y [K / 2, B * 16], keys and values side by side in rows [K / 2, 2, 4].
template <int B>
inline void dot_twice(__m512 (&s)[4][B], __m512 (&t)[4][B], const pair* x, const pair* y, const pair* rows, int half) {
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int b = 0; b < B; b++) s[i][b] = t[i][b] = _mm512_setzero_ps();
    for (int d = 0; d < half; d++, x += B * LANES, y += B * LANES, rows += 8) {
        __m512bh first[B], second[B];
        UNROLL for (int b = 0; b < B; b++) first[b] = load_pairs(x + b * LANES), second[b] = load_pairs(y + b * LANES);
        UNROLL for (int i = 0; i < 4; i++) {
            const __m512bh key = repeat(rows[i]), value = repeat(rows[4 + i]);
            UNROLL for (int b = 0; b < B; b++) {
                s[i][b] = _mm512_dpbf16_ps(s[i][b], first[b], key);
                t[i][b] = _mm512_dpbf16_ps(t[i][b], second[b], value);
            }
        }
    }
}

// sums [K, B * 16] += x [n, B * 16] times rows [n, K], both pairs of keys: a sum over keys.
template <int B>
inline void add_over_keys(float* sums, const pair* x, const pair* rows, int n, int width) {
    for (int d = 0; d < width; d += 8) {
        __m512 sum[8][B];
        UNROLL for (int t = 0; t < 8; t++)
            UNROLL for (int b = 0; b < B; b++) sum[t][b] = _mm512_loadu_ps(sums + ((d + t) * B + b) * LANES);
        for (int j = 0; j < n; j++) {
            __m512bh weights[B];
            UNROLL for (int b = 0; b < B; b++) weights[b] = load_pairs(x + (j * B + b) * LANES);
            UNROLL for (int t = 0; t < 8; t++) {
                const __m512bh value = repeat(rows[j * width + d + t]);
                UNROLL for (int b = 0; b < B; b++) sum[t][b] = _mm512_dpbf16_ps(sum[t][b], weights[b], value);
            }
        }
        UNROLL for (int t = 0; t < 8; t++)
            UNROLL for (int b = 0; b < B; b++) _mm512_storeu_ps(sums + ((d + t) * B + b) * LANES, sum[t][b]);
    }
}

// The part of add_over_queries for C vectors of 16 columns and, if R, 8 more columns.
template <int B, int C, int R>
inline void add_over_queries_at(float* sums, const pair* x, const pair* rows, int keys, int width) {
    for (int j = 0; j < keys; j += KEY_TILE) {
        __m512 sum[KEY_TILE][C + 1];
        __m256 rest[KEY_TILE];
        UNROLL for (int t = 0; t < KEY_TILE; t++) {
            UNROLL for (int c = 0; c < C; c++) sum[t][c] = _mm512_loadu_ps(sums + (j + t) * width + c * LANES);
            if (R) rest[t] = _mm256_loadu_ps(sums + (j + t) * width + C * LANES);
        }
        for (int i = 0; i < B * LANES / 2; i++) {
            __m512bh columns[C + 1];
            __m256bh last;
            UNROLL for (int c = 0; c < C; c++) columns[c] = load_pairs(rows + i * width + c * LANES);
            if (R) last = (__m256bh)_mm256_loadu_si256((const __m256i*)(rows + i * width + C * LANES));
            UNROLL for (int t = 0; t < KEY_TILE; t++) {
                const __m512bh weight = repeat(x[(j + t) * B * LANES / 2 + i]);
                UNROLL for (int c = 0; c < C; c++) sum[t][c] = _mm512_dpbf16_ps(sum[t][c], columns[c], weight);
                if (R) rest[t] = _mm256_dpbf16_ps(rest[t], last, (__m256bh)_mm512_castsi512_si256((__m512i)weight));
            }
        }
        UNROLL for (int t = 0; t < KEY_TILE; t++) {
            UNROLL for (int c = 0; c < C; c++) _mm512_storeu_ps(sums + (j + t) * width + c * LANES, sum[t][c]);
            if (R) _mm256_storeu_ps(sums + (j + t) * width + C * LANES, rest[t]);
        }
    }
}

// sums [keys, K] += x [keys, B * 8] times rows [B * 8, K], both pairs of queries: a sum over queries.
template <int B>
inline void add_over_queries(float* sums, const pair* x, const pair* rows, int keys, int width) {
    int d = 0;
    for (; d + 32 <= width; d += 32) add_over_queries_at<B, 2, 0>(sums + d, x, rows + d, keys, width);
    switch (width - d) {
        case 24: return add_over_queries_at<B, 1, 1>(sums + d, x, rows + d, keys, width);
        case 16: return add_over_queries_at<B, 1, 0>(sums + d, x, rows + d, keys, width);
        case 8: return add_over_queries_at<B, 0, 1>(sums + d, x, rows + d, keys, width);
        default: return;
    }
}

// Rounds rows j and j + 1 of B * 16 lanes; stores them as rows in `rows` and as pairs of keys in `pairs`, if not null.
template <int B>
inline void store_pair_of_keys(pair* rows, pair* pairs, const __m512 (&even)[B], const __m512 (&odd)[B]) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    if constexpr (B == 2) {
        const __m512i first = (__m512i)_mm512_cvtne2ps_pbh(even[1], even[0]);
        const __m512i second = (__m512i)_mm512_cvtne2ps_pbh(odd[1], odd[0]);
        if (rows) {
            _mm512_storeu_si512(rows, first);
            _mm512_storeu_si512(rows + LANES, second);
        }
        if (pairs) {
            const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(LANES));
            _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(first, low, second));
            _mm512_storeu_si512(pairs + LANES, _mm512_permutex2var_epi16(first, high, second));
        }
    } else {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd[0], even[0]);
        if (rows) _mm512_storeu_si512(rows, both);
        if (pairs)
            _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(both, low, _mm512_alignr_epi64(both, both, 4)));
    }
}

// Flips signs to make the factor on scores positive, so that the largest score can be found before scaling.
void negate(pair* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] ^= 0x80008000u;
}

// ---- Forward ----

template <int B>
void forward_block(const Attention& call, const Head& task, int64_t row, int n, const pair* keys, const pair* values) {
    const int width = int(call.width), half = width / 2;
    const __m512 factor = _mm512_set1_ps(__builtin_fabsf(float(call.scale)) * LOG2_E);
    alignas(64) float scores[FORWARD_KEYS * B * LANES];
    alignas(64) pair weights[FORWARD_KEYS / 2 * B * LANES];
    alignas(64) pair q[MAX_WIDTH / 2 * B * LANES];
    alignas(64) float sums[MAX_WIDTH * B * LANES];
    const bf16* from = (const bf16*)call.q + (task.q0 + row) * call.q_stride + task.head * width;
    pair_columns<B>(q, from, call.q_stride, n, width);
    if (call.scale < 0) negate(q, half * B * LANES);
    memset(sums, 0, sizeof(float) * width * B * LANES);

    __m512 largest[B], total[B];
    UNROLL for (int b = 0; b < B; b++) largest[b] = _mm512_set1_ps(-__builtin_inff()), total[b] = _mm512_setzero_ps();
    for (int64_t first = 0; first < task.lk; first += FORWARD_KEYS) {
        const int count = int(least(FORWARD_KEYS, task.lk - first));
        __m512 before[B];
        UNROLL for (int b = 0; b < B; b++) before[b] = largest[b];
        for (int j = 0; j < count; j += KEY_TILE) {
            __m512 tile[KEY_TILE][B];
            dot<B>(tile, q, keys + (first + j) * half, half);
            UNROLL for (int t = 0; t < KEY_TILE; t++) {
                UNROLL for (int b = 0; b < B; b++) {
                    _mm512_store_ps(scores + ((j + t) * B + b) * LANES, tile[t][b]);
                    largest[b] = _mm512_max_ps(largest[b], tile[t][b]);
                }
            }
        }
        __m512 shift[B];
        UNROLL for (int b = 0; b < B; b++) {
            shift[b] = _mm512_mul_ps(largest[b], factor);
            if (first == 0) continue;
            const __m512 rescale = exp2(_mm512_fmsub_ps(before[b], factor, shift[b]));
            total[b] = _mm512_mul_ps(total[b], rescale);
            for (int d = 0; d < width; d++) {
                float* at = sums + (d * B + b) * LANES;
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), rescale));
            }
        }
        for (int j = 0; j < count; j += 2) {
            __m512 even[B], odd[B];
            UNROLL for (int b = 0; b < B; b++) {
                const float* at = scores + (j * B + b) * LANES;
                even[b] = exp2(_mm512_fmsub_ps(_mm512_load_ps(at), factor, shift[b]));
                odd[b] = exp2(_mm512_fmsub_ps(_mm512_load_ps(at + B * LANES), factor, shift[b]));
            }
            if (j + 1 == count) UNROLL for (int b = 0; b < B; b++) odd[b] = _mm512_setzero_ps();
            UNROLL for (int b = 0; b < B; b++) total[b] = _mm512_add_ps(total[b], _mm512_add_ps(even[b], odd[b]));
            store_pair_of_keys<B>(nullptr, weights + j / 2 * B * LANES, even, odd);
        }
        add_over_keys<B>(sums, weights, values + first / 2 * width, (count + 1) / 2, width);
    }

    __m512 inverse[B];
    for (int b = 0; b < B; b++) {
        inverse[b] = _mm512_div_ps(_mm512_set1_ps(1.0f), total[b]);
        alignas(64) float totals[LANES], shifts[LANES];
        _mm512_store_ps(totals, total[b]);
        _mm512_store_ps(shifts, _mm512_mul_ps(largest[b], factor));
        if (!call.lse) continue;
        float* lse = lse_of(call, task, row + b * LANES);
        for (int i = 0; i < LANES && b * LANES + i < n; i++) lse[i] = shifts[i] + __builtin_log2f(totals[i]);
    }
    bf16* to = (bf16*)call.out + (task.q0 + row) * call.out_stride + task.head * width;
    store_columns<B>(to, sums, inverse, call.out_stride, n, width);
}

bool forward_task(const Attention& call, const Head& task, int64_t begin, int64_t end) {
    const int64_t size = padded(task.lk);
    const int width = int(call.width), half = width / 2;
    if (!reserve(2 * space<pair>(size * half))) return false;
    pair *keys = take<pair>(size * half), *values = take<pair>(size * half);
    four_rows(keys, 4, (const bf16*)call.k + task.k0 * call.k_stride + task.head * width, call.k_stride, task.lk, size,
              width);
    pair_rows(values, (const bf16*)call.v + task.k0 * call.v_stride + task.head * width, call.v_stride, task.lk, size,
              width);
    for (int64_t row = begin; row < end; row += 2 * LANES) {
        const int n = int(least(2 * LANES, end - row));
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
    const pair* rows;   // keys and values, [size / 4, K / 2, 2, 4], pairs of columns
    const pair* pairs;  // keys, [size / 2, K], or null for no gradient of queries
    float *dk, *dv;     // [size, K] sums, or null
};

// The negative sum over K of out * dout, for B * 16 rows.
template <int B>
void minus_deltas(float* to, const bf16* out, const bf16* dout, int64_t stride, int n, int width) {
    for (int row = 0; row < B * LANES; row++) {
        __m256 sum = _mm256_setzero_ps();
        for (int d = 0; row < n && d < width; d += 8) {
            const __m128i x = _mm_loadu_si128((const __m128i*)(out + row * stride + d));
            const __m128i y = _mm_loadu_si128((const __m128i*)(dout + row * stride + d));
            sum = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16),
                                  (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(y), 16), sum);
        }
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        to[row] = -_mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }
}

template <int B>
void backward_block(const Attention& call, const Head& task, int64_t row, int n, const Gathered& part) {
    constexpr int TILE = 4;  // the sums of two products, 16 of B * 16 queries, fit the registers
    const int width = int(call.width), half = width / 2;
    const __m512 factor = _mm512_set1_ps(float(call.scale) * LOG2_E);
    alignas(64) pair q[MAX_WIDTH / 2 * B * LANES], dout[MAX_WIDTH / 2 * B * LANES];
    alignas(64) pair q_pairs[B * LANES / 2 * MAX_WIDTH], dout_pairs[B * LANES / 2 * MAX_WIDTH];
    alignas(64) pair weights[BACKWARD_KEYS * B * LANES / 2], slopes[BACKWARD_KEYS * B * LANES / 2];
    alignas(64) pair slope_pairs[BACKWARD_KEYS / 2 * B * LANES];
    alignas(64) float sums[MAX_WIDTH * B * LANES], deltas[B * LANES], lses[B * LANES] = {};
    const int64_t stride = call.heads * width, at = (task.q0 + row) * stride + task.head * width;
    const bf16* from = (const bf16*)call.q + (task.q0 + row) * call.q_stride + task.head * width;
    const bf16 *slope = (const bf16*)call.dout + at;
    pair_columns<B>(q, from, call.q_stride, n, width);
    pair_columns<B>(dout, slope, stride, n, width);
    if (part.dk) {
        pair_rows(q_pairs, from, call.q_stride, n, B * LANES, width);
        pair_rows(dout_pairs, slope, stride, n, B * LANES, width);
    }
    minus_deltas<B>(deltas, (const bf16*)call.out + at, slope, stride, n, width);
    memcpy(lses, lse_of(call, task, row), n * sizeof(float));
    memset(sums, 0, sizeof(float) * width * B * LANES);

    for (int64_t first = 0; first < part.count; first += BACKWARD_KEYS) {
        const int count = int(least(BACKWARD_KEYS, part.count - first)), size = int(padded(count));
        for (int j = 0; j < size; j += TILE) {
            __m512 p[TILE][B], ds[TILE][B];
            dot_twice<B>(p, ds, q, dout, part.rows + (first + j) * width, half);
            UNROLL for (int t = 0; t < TILE; t++) {
                UNROLL for (int b = 0; b < B; b++) {
                    p[t][b] = exp2(_mm512_fmsub_ps(p[t][b], factor, _mm512_load_ps(lses + b * LANES)));
                    ds[t][b] = _mm512_mul_ps(p[t][b], _mm512_add_ps(ds[t][b], _mm512_load_ps(deltas + b * LANES)));
                }
            }
            UNROLL for (int t = 0; t < TILE; t += 2) {
                pair* rows = slopes + (j + t) * B * LANES / 2;
                store_pair_of_keys<B>(weights + (j + t) * B * LANES / 2, nullptr, p[t], p[t + 1]);
                store_pair_of_keys<B>(rows, slope_pairs + (j + t) / 2 * B * LANES, ds[t], ds[t + 1]);
            }
        }
        if (part.dk) {
            add_over_queries<B>(part.dv + first * width, weights, dout_pairs, size, width);
            add_over_queries<B>(part.dk + first * width, slopes, q_pairs, size, width);
        }
        if (part.pairs) add_over_keys<B>(sums, slope_pairs, part.pairs + first / 2 * width, (count + 1) / 2, width);
    }
    if (!part.pairs) return;
    __m512 scale[B];
    UNROLL for (int b = 0; b < B; b++) scale[b] = _mm512_set1_ps(float(call.scale));
    store_columns<B>((bf16*)call.dq + at, sums, scale, stride, n, width);
}

// Gradients of queries q_begin:q_end, or of keys and values k_begin:k_end, or of both if the ranges hold all rows.
bool backward_task(const Attention& call, const Head& task, int64_t q_begin, int64_t q_end, int64_t k_begin, int64_t k_end,
                   bool queries, bool keys) {
    const int64_t count = k_end - k_begin, size = padded(count);
    const int width = int(call.width), half = width / 2;
    if (!reserve(space<pair>(size * width) + space<pair>(size * half) + 2 * space<float>(size * width))) return false;
    const bf16* k = (const bf16*)call.k + (task.k0 + k_begin) * call.k_stride + task.head * width;
    const bf16* v = (const bf16*)call.v + (task.k0 + k_begin) * call.v_stride + task.head * width;
    pair *rows = take<pair>(size * width), *pairs = take<pair>(size * half);
    four_rows(rows, 8, k, call.k_stride, count, size, width);
    four_rows(rows + 4, 8, v, call.v_stride, count, size, width);
    if (queries) pair_rows(pairs, k, call.k_stride, count, size, width);
    Gathered part{count, rows, queries ? pairs : nullptr, nullptr, nullptr};
    if (keys) {
        part.dk = take<float>(size * width);
        part.dv = take<float>(size * width);
        memset(part.dk, 0, size * width * sizeof(float));
        memset(part.dv, 0, size * width * sizeof(float));
    }
    for (int64_t row = q_begin; row < q_end; row += 2 * LANES) {
        const int n = int(least(2 * LANES, q_end - row));
        if (n > LANES)
            backward_block<2>(call, task, row, n, part);
        else
            backward_block<1>(call, task, row, n, part);
    }
    if (keys) {
        const int64_t stride = call.heads * width, at = (task.k0 + k_begin) * stride + task.head * width;
        store_rows((bf16*)call.dk + at, part.dk, float(call.scale), stride, count, width);
        store_rows((bf16*)call.dv + at, part.dv, 1.0f, stride, count, width);
    }
    return true;
}

}  // namespace narrow

#endif
