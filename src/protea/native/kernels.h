// What Python calls: the arguments, and the table of functions that exists once for each instruction set.
//
// Shapes: T tokens of all sequences, D inputs and N outputs of a linear layer, H heads, K head width. Rows of tensors
// may lie apart: strides count items. Structures hold only items of eight bytes, so that no compiler pads them.

#pragma once

#include <cstdint>

// A function of OpenMP, which every OpenMP runtime exports: runs a function in a number of threads, this one included.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
// GELU_SLOPE multiplies by the slope of GELU at `before`.
enum Activation : int64_t { NONE = 0, GELU = 1, GELU_TANH = 2, RELU = 3, GELU_SLOPE = 4 };

// y = activation(norm(x) W + b) + residual, with pairs of outputs rotated before all but the bias.
struct Linear {
    const void* x;  // [T, D]
    int64_t x_stride, x_step, x_type;  // from row to row, and from input to input, which is 1 but for plain float32
    const float *norm_weight, *norm_bias;  // [D] each, or null: x is multiplied as it is
    double norm_epsilon;
    int64_t centred;  // whether the norm subtracts the mean, as LayerNorm does and RMSNorm does not
    const void* weight;  // as pack_linear ordered it, of w_type; x is rounded to that type for the product
    int64_t w_type, w_step;  // 0, or a float32 weight is not packed but [D, N], its rows so far apart, N full panels
    const float* bias;  // [N], or null
    int64_t activation;
    void* before;  // [T, N] of y_type: GELU's input, which GELU writes there and GELU_SLOPE reads; GELU's may be null
    int64_t before_stride;
    const float *cosine, *sine;  // [T, angle_stride], angles of outputs 0:K once more from K on; or null
    int64_t angle_stride, head_width, rotated;  // outputs 0:rotated turn in neighbouring pairs
    const float* residual;                      // [T, N], or null; may be y
    int64_t residual_stride;
    void* y;  // [T, N]
    int64_t y_stride, y_type;
    int64_t rows, inputs, outputs;
    const int32_t* cu;  // [B + 1], boundaries, or null: row t of y comes from row t + distance of x, if that belongs to
    int64_t sequences, distance;  // the same sequence, and else stays as it is
};

// Softmax attention within the sequences of a pack. All tensors are float32, or bfloat16 where an instruction set has it;
// `out` may be bfloat16 beside float32.
struct Attention {
    const void *q, *k, *v;                // [Tq, H, K], [Tk, H, K], [Tk, H, K]
    int64_t q_stride, k_stride, v_stride;  // from token to token; heads follow one another without gaps
    void* out;                            // [Tq, H, K], forward writes it, backward reads it
    int64_t out_stride, out_type;
    float* lse;        // [H, Tq], logarithms of the sums of exponentials, of the kernel's own base; may be null
    const float* bias;  // [H, rows, columns], added to scaled scores from the first token of each sequence on, or null
    int64_t bias_head_stride, bias_row_stride, bias_column_stride;
    const void* dout;                     // [Tq, H, K], contiguous, as are the gradients
    void *dq, *dk, *dv;
    const int32_t *cu_q, *cu_k, *order;  // [B + 1], [B + 1], [B]: boundaries, and the sequences, longest first
    int64_t sequences, heads, width, type;
    double scale;  // factor on scores
};

// y = factor times the heads of x, whose first and second halves turn by angles, or back by them.
struct Rotation {
    const void* x;  // [T, H, K], heads without gaps
    void* y;        // [T, H, K]; may be x
    int64_t x_stride, y_stride, type;
    const float *cosine, *sine;  // [T, K / 2]
    int64_t rows, heads, width, back;
    double factor;
};

struct Kernels {
    const char* name;
    int64_t (*packed_bytes)(int64_t outputs, int64_t inputs, int64_t type);
    void (*pack_linear)(void* to, const void* weight, int64_t outputs, int64_t inputs, int64_t type,
                        int64_t output_stride, int64_t input_stride);
    void (*unpack_linear)(void* weight, const void* packed, int64_t outputs, int64_t inputs, int64_t type);
    int (*linear)(const Linear*, int64_t threads, Parallel);
    int (*rotate)(const Rotation*, int64_t threads, Parallel);
    int (*attention_forward)(const Attention*, int64_t threads, Parallel);
    int (*attention_backward)(const Attention*, int64_t threads, Parallel);
    int64_t types;  // bit 0: float32, bit 1: bfloat16, bit 2: int8
};
