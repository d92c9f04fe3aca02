// Linear layers with what comes before and after them: a norm, a rotation, an activation, a residual.
//
// A weight is stored in panels of WIDE outputs, input by input, so that the innermost loop reads it in order. A tile of
// ROWS rows and one panel keeps its sums in registers. Each sum adds the inputs in one order, whatever rows are computed
// together and by however many threads: the bits of a row depend on that row alone.

#pragma once

#include "bytes.h"
#include "kernels.h"
#include "simd.h"

constexpr int WIDE = 2 * LANES;
constexpr int ROWS = REGISTERS == 32 ? 12 : 6;  // 2 * ROWS sums, and registers for two weights and an input
constexpr int64_t DEPTH_APART = 320;            // the same for inputs that lie apart, each in a page of its own
constexpr int64_t BLOCK_BYTES = 256 << 10;      // inputs of a block of rows, which stay there too
constexpr int64_t FAR_BYTES = 8 << 20;          // weights from this size on come from memory, and are fetched ahead

// P(t) / t for GELU.
inline vec gelu_tail(vec t) {
    vec p = all(0.036630005f);
    p = p * t + -0.160839185f;
    p = p * t + 0.211925521f;
    p = p * t + -0.058064260f;
    p = p * t + 0.130417153f;
    p = p * t + 0.099512115f;
    p = p * t + 0.120789669f;
    return p * t + 0.119628906f;
}

// GELU by max(x, 0) - |x| Q(|x|), where Q(a) = exp(-a^2 / 2) t P(t) with t = 1 / (1 + 0.3 a) is the upper tail of the
// normal distribution; P was fitted to it, and the result is within 6e-8 of the exact one. Infinity gives itself, minus
// infinity gives NaN.
inline vec gelu(vec x) {
    const vec a = larger(as_float(as_int(x) ^ INT32_MIN), x < 30.0f ? x : all(30.0f));
    const vec t = 1.0f / (1.0f + 0.3f * a);
    return larger(x, vec{}) - a * t * gelu_tail(t) * exp2(a * a * -0.72134752f);  // log2(e) / 2
}

// The slope of GELU: the share of the normal distribution below x, and x times its density.
inline vec gelu_slope(vec x) {
    const vec a = as_float(as_int(x) & INT32_MAX), near = a > 30.0f ? all(30.0f) : a;
    const vec t = 1.0f / (1.0f + 0.3f * near), e = exp2(near * near * -0.72134752f);
    const vec tail = t * gelu_tail(t) * e - near * e * 0.39894228f;  // of -|x|
    return x < 0.0f ? tail : 1.0f - tail;
}

// x / (1 + exp(-2 z)) is x (1 + tanh(z)) / 2. Minus infinity gives NaN.
inline vec gelu_tanh(vec x) {
    const vec z = x * (0.79788456f + 0.035677408f * x * x);
    const vec exponent = z * -2.8853901f;
    return exponent < 126.0f ? x / (1.0f + exp2(exponent)) : x * 0.0f;
}

// One panel of a weight in float32 and in pairs of bfloat16; `Item` is what one lane holds of a row for a step.
struct Wide32 {
    using Stored = float;
    using Sum = vec;
    using Item = float;
    static constexpr int64_t STEP = 1;
    static constexpr int64_t CHUNK = 256;          // steps that are summed apart: shorter sums are more exact
    static constexpr int64_t DEPTH = 1280;         // inputs whose weights of a panel stay in the second-level cache
    static constexpr int64_t HEAD = 0, X_HEAD = 0;  // items before each chunk of a panel and of a row
    static vec begin(const Item*, const Item*) { return vec{}; }
    static vec end(vec total, vec sum, const Item*, const Item*) { return total + sum; }
    static vec add(vec sum, vec weights, vec item) { return sum + weights * item; }
    static vec weights(const Item* p) { return load(p); }
    static vec repeat(Item x) { return all(x); }
};

#if defined(__AVX512BF16__)
struct Pairs {
    using Stored = bf16;
    using Sum = vec;
    using Item = pair;
    static constexpr int64_t STEP = 2, CHUNK = 256, DEPTH = 1280, HEAD = 0, X_HEAD = 0;
    static vec begin(const Item*, const Item*) { return vec{}; }
    static vec end(vec total, vec sum, const Item*, const Item*) { return total + sum; }
    static vec add(vec sum, vec weights, vec item) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)item);
    }
    static vec weights(const Item* p) { return (vec)_mm512_loadu_si512(p); }
    static vec repeat(Item x) { return (vec)_mm512_set1_epi32(int(x)); }
};
#endif

// sums[M][2] += rows of x times a panel, over `steps` steps, which lie `wide` items apart in the panel. Either the steps
// of a row or the rows of a step lie side by side. Half a panel is fetched from `ahead` meanwhile.
template <class Kind, int M, bool AHEAD>
inline void multiply(typename Kind::Sum (&sums)[M][2], const typename Kind::Item* x, int64_t stride, int64_t apart,
                     const typename Kind::Item* panel, int64_t wide, int64_t steps,
                     const typename Kind::Item* ahead) {
    using Item = typename Kind::Item;
    using Sum = typename Kind::Sum;
    auto add = [&](int m, Sum low, Sum high, Item item) {
        sums[m][0] = Kind::add(sums[m][0], low, Kind::repeat(item));
        sums[m][1] = Kind::add(sums[m][1], high, Kind::repeat(item));
    };
    if (!Kind::HEAD && apart != 1) {
        for (int64_t step = 0; step < steps; step++, panel += wide, x += apart) {
            const Sum low = Kind::weights(panel), high = Kind::weights(panel + LANES);
            if (AHEAD) {
                __builtin_prefetch(x + DEPTH_APART * apart, 0, 2);
                __builtin_prefetch(panel + DEPTH_APART * wide, 0, 2);
                __builtin_prefetch(panel + DEPTH_APART * wide + LANES, 0, 2);
            }
            UNROLL for (int m = 0; m < M; m++) add(m, low, high, x[m]);
        }
        return;
    }
    // Few addresses that change: three rows share one.
    constexpr int GROUPS = (M + 2) / 3;
    const Item* rows[GROUPS];
    UNROLL for (int g = 0; g < GROUPS; g++) rows[g] = x + 3 * g * stride;
    for (int64_t step = 0; step < steps; step++, panel += wide) {
        const Sum low = Kind::weights(panel), high = Kind::weights(panel + LANES);
        if (AHEAD) __builtin_prefetch(ahead + step * LANES, 0, 2);
        UNROLL for (int m = 0; m < M; m++) add(m, low, high, rows[m / 3][m % 3 * stride + step]);
    }
}

// Begin to fetch what `finish` will need of a row: it lies far apart for the processor to foresee.
inline void fetch(const Linear& call, int64_t row, int64_t column) {
    if (call.residual) {
        const float* residual = call.residual + row * call.residual_stride + column;
        __builtin_prefetch(residual);
        __builtin_prefetch(residual + LANES);
    }
    if (call.activation == GELU_SLOPE) {
        const int64_t size = call.y_type == BFLOAT16 ? 2 : 4;
        const char* before = (const char*)call.before + (row * call.before_stride + column) * size;
        __builtin_prefetch(before);
        if (size == 4) __builtin_prefetch(before + BYTES);
    }
}

// Store a row's results of a panel, as far as there are `left`; its line may be in the cache.
inline void store_row(void* to, int64_t type, int64_t at, vec (&values)[2], int64_t left, bool cached) {
    bf16* narrow = (bf16*)to + at;
    float* wide = (float*)to + at;
    if (type == BFLOAT16 && left >= WIDE) return stream(narrow, values[0], values[1]);
    UNROLL for (int half = 0; half < 2; half++) {
        const int64_t n = left - half * LANES;
        if (n <= 0) return;
        if (type == BFLOAT16)
            store_first(narrow + half * LANES, values[half], n);
        else if (cached)
            store_first(wide + half * LANES, values[half], n);
        else
            stream_first(wide + half * LANES, values[half], n);
    }
}

// GELU's input for the outputs column:column + LANES of a row, as far as there are n.
inline vec load_before(const Linear& call, int64_t row, int64_t column, int64_t n) {
    const int64_t at = row * call.before_stride + column;
    if (call.y_type == BFLOAT16) return load_first((const bf16*)call.before + at, n);
    return load_first((const float*)call.before + at, n);
}

// What follows the product, for the outputs column:column + WIDE of a row, as far as there are so many.
// Never inlined: the compiler might fuse its operations otherwise in tiles of another height.
__attribute__((noinline)) inline void finish(const Linear& call, int64_t row, int64_t first, vec (&sums)[2]) {
    const int64_t left = call.outputs - first;
    vec before[2];
    UNROLL for (int half = 0; half < 2; half++) {
        const int64_t column = first + half * LANES, n = left - half * LANES;
        if (n <= 0) break;
        vec y = sums[half];
        if (call.bias) y = y + load_first(call.bias + column, n);
        if (call.cosine && column < call.rotated) {
            const int64_t at = row * call.angle_stride + column % call.head_width;
            const vec turned = y * load(call.cosine + at) + swap_pairs(y) * load(call.sine + at);
            y = call.rotated - column >= LANES ? turned : joined(turned, y, call.rotated - column);
        }
        before[half] = y;
        if (call.activation == GELU) y = gelu(y);
        if (call.activation == GELU_SLOPE) y = y * gelu_slope(load_before(call, row, column, n));
        if (call.activation == GELU_TANH) y = gelu_tanh(y);
        if (call.activation == RELU) y = larger(y, vec{});
        if (call.residual) y = y + load_first(call.residual + row * call.residual_stride + column, n);
        sums[half] = y;
    }
    if (call.activation == GELU && call.before)
        store_row(call.before, call.y_type, row * call.before_stride + first, before, left, false);
    store_row(call.y, call.y_type, row * call.y_stride + first, sums, left, call.y == call.residual);
}

// Calls f(i, n) for each vector of a row, with the number of items that are left, or LANES.
template <class F>
inline void for_vectors(int64_t size, F f) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) f(i, LANES);
    if (i < size) f(i, size - i);
}

// The sum of f(i, n) over the vectors of a row: four at a time, as each addition waits for the one before.
template <class F>
inline float sum_of_vectors(int64_t size, F f) {
    vec sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        UNROLL for (int k = 0; k < 4; k++) sums[k] = sums[k] + f(i + k * LANES, LANES);
    for (; i < size; i += LANES) sums[0] = sums[0] + f(i, size - i);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// One row of inputs as the product wants it; zeros fill it up to `size`.
template <class Stored, class From>
inline void prepare(Stored* to, const From* x, const Linear& call, int64_t size) {
    const int64_t n = call.inputs;
    const float *scale = call.norm_weight, *offset = call.norm_bias;
    if (scale) {
        float shift = 0;
        if (call.centred)
            shift = sum_of_vectors(n, [&](int64_t i, int64_t left) { return load_first(x + i, left); }) / float(n);
        const float squares = sum_of_vectors(n, [&](int64_t i, int64_t left) {
            const vec d = load_first(x + i, left) - shift;
            const vec kept = left >= LANES ? d : load_first((const float*)&d, left);
            return kept * kept;
        });
        const float factor = 1.0f / __builtin_sqrtf(squares / float(n) + float(call.norm_epsilon));
        for_vectors(n, [&](int64_t i, int64_t left) {
            vec y = (load_first(x + i, left) - shift) * factor * load_first(scale + i, left);
            if (offset) y = y + load_first(offset + i, left);
            store_first(to + i, y, left);
        });
    } else {
        for_vectors(n, [&](int64_t i, int64_t left) { store_first(to + i, load_first(x + i, left), left); });
    }
    for (int64_t i = n; i < size; i++) to[i] = 0;
}

template <class Kind>
struct LinearWork : Queue {
    using Stored = typename Kind::Stored;
    using Item = typename Kind::Item;
    static constexpr int64_t CHUNK = Kind::CHUNK;
    static constexpr bool BYTEWISE = sizeof(Stored) == 1;  // rows are rounded after their norm

    const Linear& call;
    int64_t size, steps, panels;                 // inputs with padding, steps of a sum, panels of the weight
    int64_t x_items, w_items;                    // of a prepared row and of one output of a panel
    int64_t depths;                              // parts of a sum whose weights of a panel fit the cache
    int64_t stride;                              // between prepared rows
    int64_t wide;                                // between the steps of a panel
    int64_t block, blocks, group, groups;        // rows of a block, panels of a group
    bool direct;                                 // whether x is multiplied where it lies
    bool apart;                                  // whether the inputs of a row lie apart
    bool far;                                    // whether the weights come from memory

    LinearWork(const Linear& call, int64_t threads) : call(call) {
        size = rounded_up(call.inputs, Kind::STEP);
        steps = size / Kind::STEP;
        panels = (call.outputs + WIDE - 1) / WIDE;
        apart = call.x_step != 1;
        const int64_t deepest = apart ? DEPTH_APART : Kind::DEPTH;
        x_items = with_heads(steps, Kind::X_HEAD), w_items = with_heads(steps, Kind::HEAD);
        depths = (size + deepest - 1) / deepest;
        wide = call.w_step ? call.w_step : WIDE;
        const int64_t fits = BLOCK_BYTES / int64_t(least(size, deepest) * sizeof(Stored)) / ROWS * ROWS;
        const int64_t share = rounded_up((call.rows + threads - 1) / threads, ROWS);
        block = most(ROWS, least(least(fits, 16 * ROWS), share));
        blocks = (call.rows + block - 1) / block;
        // Few blocks are divided among more threads by outputs.
        groups = threads == 1 || blocks == 0 || blocks >= 4 * threads ? 1 : least(panels, (4 * threads + blocks - 1) / blocks);
        group = (panels + groups - 1) / groups;
        groups = (panels + group - 1) / group;
        // Rows that lie a multiple of 2 KB apart would fight for the same few lines of a cache.
        const bool fitting = call.x_type == (sizeof(Stored) == 2 ? BFLOAT16 : FLOAT32);
        const int64_t bytes = call.x_stride * int64_t(sizeof(Stored));
        direct = apart ||
                 (!BYTEWISE && fitting && !call.norm_weight && size == call.inputs && bytes % 2048 != 0 &&
                  bytes % int64_t(sizeof(Item)) == 0 && (uintptr_t)call.x % sizeof(Item) == 0);
        stride = x_items * Kind::STEP + 64 / int64_t(sizeof(Stored));
        far = !call.w_step && panels * w_items * WIDE * int64_t(sizeof(Item)) >= FAR_BYTES;
    }

    // Items of so many steps, with a number of them before each chunk.
    static int64_t with_heads(int64_t steps, int64_t head) { return steps + (steps + CHUNK - 1) / CHUNK * head; }

    void run() {
        const size_t rows_bytes = direct ? 0 : space<Stored>(block * stride) + (BYTEWISE ? space<float>(size) : 0);
        const size_t sums_bytes = depths == 1 ? 0 : space<float>(block * group * WIDE);
        for (int64_t task = take(); task < blocks * groups; task = take()) {
            if (!reserve(rows_bytes + sums_bytes)) return fail();
            const int64_t first = task / groups * block, n = least(block, call.rows - first);
            const int64_t panel = task % groups * group;
            Stored* prepared = direct ? nullptr : ::PROTEA_SET::take<Stored>(block * stride);
            float* sums = depths == 1 ? nullptr : ::PROTEA_SET::take<float>(block * group * WIDE);
            float* normed = BYTEWISE ? ::PROTEA_SET::take<float>(size) : nullptr;
            const int64_t last = least(panels, panel + group);
            if (!call.cu) multiply_block(prepared, sums, normed, first, n, panel, last);
            for (int64_t s = 0; call.cu && s < call.sequences && call.cu[s] < first + n; s++) {
                const int64_t start = most(first, most(call.cu[s], call.cu[s] - call.distance));
                const int64_t end = least(first + n, least(call.cu[s + 1], call.cu[s + 1] - call.distance));
                if (start < end) multiply_block(prepared, sums, normed, start, end - start, panel, last);
            }
        }
        finish_streams();
        give_back();
    }

    template <class From>
    void prepare_row(Stored* to, const From* x, float* normed) {
#if defined(MULTIPLIES_BYTES)
        if constexpr (BYTEWISE) {
            if (!call.norm_weight) return to_bytes((uint32_t*)to, x, call.inputs);
            prepare(normed, x, call, call.inputs);
            return to_bytes((uint32_t*)to, normed, call.inputs);
        }
#endif
        if constexpr (!BYTEWISE) prepare(to, x, call, size);
    }

    void multiply_block(Stored* prepared, float* sums, float* normed, int64_t first, int64_t n, int64_t panel,
                        int64_t end) {
        const int64_t from = (first + call.distance) * call.x_stride;
        const Stored* x = (const Stored*)call.x + from;
        int64_t x_stride = call.x_stride;
        if (!direct) {
            for (int64_t row = 0; row < n; row++) {
                if (call.x_type == BFLOAT16)
                    prepare_row(prepared + row * stride, (const bf16*)call.x + from + row * call.x_stride, normed);
                else
                    prepare_row(prepared + row * stride, (const float*)call.x + from + row * call.x_stride, normed);
            }
            x = prepared, x_stride = stride;
        }
        int64_t depth = (steps + depths - 1) / depths;
        if (Kind::HEAD) depth = rounded_up(depth, CHUNK);
        for (int64_t start = 0; start < steps; start += depth)
            for (int64_t p = panel; p < end; p++) {
                const int64_t count = least(depth, steps - start);
                const int64_t packed = (p * w_items + with_heads(start, Kind::HEAD)) * WIDE;
                const Item* weights = (const Item*)call.weight + (call.w_step ? start * wide + p * WIDE : packed);
                float* kept = sums + (p - panel) * block * WIDE;
                const Part part{(const Item*)x + with_heads(start, Kind::X_HEAD) * call.x_step, x_stride / Kind::STEP,
                                weights, count, kept, start == 0, start + count == steps, first, p * WIDE};
                int64_t row = 0;
                // The first two tiles fetch the next panel's weights; or the first use of each item that lies apart
                // fetches what this tile needs of the next part.
                const int64_t fetching = apart ? (p == panel ? n : ROWS) : far ? 2 * ROWS : 0;
                for (; row < fetching && row + ROWS <= n; row += ROWS) tile<ROWS, true>(part, row);
                for (; row + ROWS <= n; row += ROWS) tile<ROWS>(part, row);
                if (ROWS > 8 && row + 8 <= n) tile<8>(part, row), row += 8;
                if (row + 4 <= n) tile<4>(part, row), row += 4;
                if (row + 2 <= n) tile<2>(part, row), row += 2;
                if (row < n) tile<1>(part, row);
            }
    }

    struct Part {
        const Item* x;
        int64_t stride;
        const Item* weights;
        int64_t steps;
        float* sums;
        bool first, last;
        int64_t row, column;
    };

    template <int M, bool AHEAD = false>
    void tile(const Part& part, int64_t row) {
        vec totals[M][2];
        float* kept = part.sums + row * WIDE;
        if (part.last) {
            UNROLL for (int m = 0; m < M; m++) fetch(call, part.row + row + m, part.column);
        }
        UNROLL for (int m = 0; m < M; m++) {
            totals[m][0] = part.first ? vec{} : load(kept + m * WIDE);
            totals[m][1] = part.first ? vec{} : load(kept + m * WIDE + LANES);
        }
        const Item *x = part.x + row * part.stride, *panel = part.weights;
        for (int64_t step = 0; step < part.steps; step += CHUNK) {
            typename Kind::Sum sums[M][2];
            UNROLL for (int m = 0; m < M; m++) {
                sums[m][0] = Kind::begin(x + m * part.stride, panel);
                sums[m][1] = Kind::begin(x + m * part.stride, panel + LANES);
            }
            const int64_t count = least(CHUNK, part.steps - step);
            if (Kind::HEAD) __asm__ volatile("" : : "r"(totals) : "memory");  // the registers are for the sums
            multiply<Kind, M, AHEAD>(sums, x + Kind::X_HEAD, part.stride, call.x_step, panel + Kind::HEAD * WIDE, wide,
                                     count, part.weights + w_items * WIDE + (row / ROWS * part.steps + step) * LANES);
            UNROLL for (int m = 0; m < M; m++) {
                totals[m][0] = Kind::end(totals[m][0], sums[m][0], x + m * part.stride, panel);
                totals[m][1] = Kind::end(totals[m][1], sums[m][1], x + m * part.stride, panel + LANES);
            }
            x += (count + Kind::X_HEAD) * call.x_step, panel += (count + Kind::HEAD) * wide;
        }
        if (part.last) {
            for (int m = 0; m < M; m++) finish(call, part.row + row + m, part.column, totals[m]);
        } else {
            UNROLL for (int m = 0; m < M; m++) {
                store(kept + m * WIDE, totals[m][0]);
                store(kept + m * WIDE + LANES, totals[m][1]);
            }
        }
    }
};

template <class Kind>
inline int linear_of(const Linear* call, int64_t threads, Parallel parallel) {
    LinearWork<Kind> work(*call, threads);
    auto thread = [](void* data) { static_cast<LinearWork<Kind>*>(data)->run(); };
    if (threads > 1 && parallel)
        parallel(thread, &work, unsigned(threads), 0);
    else
        thread(&work);
    return work.failed;
}

inline int linear(const Linear* call, int64_t threads, Parallel parallel) {
#if defined(__AVX512BF16__)
    if (call->w_type == BFLOAT16) return linear_of<Pairs>(call, threads, parallel);
#endif
#if defined(MULTIPLIES_BYTES)
    if (call->w_type == INT8) return linear_of<Bytes>(call, threads, parallel);
#endif
    return linear_of<Wide32>(call, threads, parallel);
}

// Where the item of output n and input d lies in the panels of a weight; `step` inputs lie side by side.
inline int64_t place(int64_t n, int64_t d, int64_t size, int64_t step) {
    return n / WIDE * WIDE * size + d / step * step * WIDE + n % WIDE * step + d % step;
}

inline int64_t packed_bytes(int64_t outputs, int64_t inputs, int64_t type) {
    if (type == INT8) return bytes_of_int8(rounded_up(outputs, WIDE), inputs);
    const int64_t step = type == BFLOAT16 ? 2 : 1;
    return rounded_up(outputs, WIDE) * rounded_up(inputs, step) * (type == BFLOAT16 ? 2 : 4);
}

template <class Item>
inline void pack_items(Item* to, const Item* from, int64_t outputs, int64_t inputs, int64_t output_stride,
                       int64_t input_stride) {
    constexpr int64_t STEP = 4 / sizeof(Item);
    const int64_t size = rounded_up(inputs, STEP);
    for (int64_t first = 0; first < outputs; first += WIDE)
        for (int64_t d = 0; d < size; d++)
            for (int64_t n = first; n < first + WIDE; n++)
                to[place(n, d, size, STEP)] =
                    n < outputs && d < inputs ? from[n * output_stride + d * input_stride] : Item(0);
}

template <class Item>
inline void unpack_items(Item* to, const Item* from, int64_t outputs, int64_t inputs) {
    constexpr int64_t STEP = 4 / sizeof(Item);
    for (int64_t n = 0; n < outputs; n++)
        for (int64_t d = 0; d < inputs; d++) to[n * inputs + d] = from[place(n, d, rounded_up(inputs, STEP), STEP)];
}

inline void pack_linear(void* to, const void* weight, int64_t outputs, int64_t inputs, int64_t type,
                        int64_t output_stride, int64_t input_stride) {
    if (type == INT8)
        pack_int8((int8_t*)to, (const float*)weight, outputs, inputs, output_stride, input_stride, WIDE);
    else if (type == BFLOAT16)
        pack_items((bf16*)to, (const bf16*)weight, outputs, inputs, output_stride, input_stride);
    else
        pack_items((uint32_t*)to, (const uint32_t*)weight, outputs, inputs, output_stride, input_stride);
}

inline void unpack_linear(void* weight, const void* packed, int64_t outputs, int64_t inputs, int64_t type) {
    if (type == INT8)
        unpack_int8((float*)weight, (const int8_t*)packed, outputs, inputs, WIDE);
    else if (type == BFLOAT16)
        unpack_items((bf16*)weight, (const bf16*)packed, outputs, inputs);
    else
        unpack_items((uint32_t*)weight, (const uint32_t*)packed, outputs, inputs);
}
