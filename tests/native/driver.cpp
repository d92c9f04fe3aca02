// Calls the native library as Python does, without Python, so that an emulated processor can run it.
//
//     driver LIBRARY [INSTRUCTION_SET]
//
// Prints the instruction set and the largest relative error of each result to plain loops in double precision. Exit
// code 0: all errors are small; 1: one is not; 2: the library cannot be loaded; 3: it refuses this processor or the set.

#include <dlfcn.h>
#include <pthread.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

static void* library;

template <class Function>
static Function* find(const char* name) {
    void* found = dlsym(library, name);
    if (!found) fprintf(stderr, "%s\n", dlerror()), exit(2);
    return (Function*)found;
}

// ---- threads, as GOMP_parallel runs them ----

struct Job {
    void (*function)(void*);
    void* data;
};

static void* run_job(void* job) {
    static_cast<Job*>(job)->function(static_cast<Job*>(job)->data);
    return nullptr;
}

static void parallel(void (*function)(void*), void* data, unsigned threads, unsigned) {
    pthread_t others[8];
    Job job{function, data};
    for (unsigned i = 1; i < threads; i++) pthread_create(&others[i], nullptr, run_job, &job);
    function(data);
    for (unsigned i = 1; i < threads; i++) pthread_join(others[i], nullptr);
}

// ---- numbers ----

struct Numbers {
    size_t count;
    float* data;
    explicit Numbers(size_t count) : count(count), data((float*)aligned_alloc(64, (count * 4 + 127) / 64 * 64)) {
        static uint32_t state = 1;
        for (size_t i = 0; i < count; i++) {
            state = state * 1664525u + 1013904223u;
            data[i] = float(state >> 8) / float(1 << 23) - 1.0f;  // from -1 to 1
        }
    }
    float& operator[](size_t i) const { return data[i]; }
};

static int failed = 0;

static void compare(const char* what, const Numbers& ours, const double* exact, size_t count) {
    double error = 0, largest = 0;
    for (size_t i = 0; i < count; i++) {
        const double difference = std::fabs(ours[i] - exact[i]);
        if (!(difference <= error)) error = difference;  // NaN too
        largest = std::fmax(largest, std::fabs(exact[i]));
    }
    const bool good = error <= 1e-5 * largest;
    printf("%s %.1e%s\n", what, error / largest, good ? "" : " WRONG");
    failed |= !good;
}

// ---- a linear layer with its norm, GELU and residual ----

static void check_linear(int64_t rows, int64_t inputs, int64_t outputs, int64_t threads) {
    const Numbers x(rows * inputs), weight(outputs * inputs), bias(outputs), norm(inputs), shift(inputs);
    const Numbers residual(rows * outputs), y(rows * outputs);
    const Numbers packed(find<int64_t(int64_t, int64_t, int64_t)>("protea_packed_bytes")(outputs, inputs, FLOAT32) / 4);
    using Pack = void(void*, const void*, int64_t, int64_t, int64_t, int64_t, int64_t);
    find<Pack>("protea_pack_linear")(packed.data, weight.data, outputs, inputs, FLOAT32, inputs, 1);
    Linear call{};
    call.x = x.data, call.x_stride = inputs, call.x_step = call.centred = 1, call.norm_weight = norm.data, call.norm_bias = shift.data;
    call.norm_epsilon = 1e-5, call.weight = packed.data, call.bias = bias.data, call.activation = GELU;
    call.residual = residual.data, call.residual_stride = outputs, call.y = y.data, call.y_stride = outputs;
    call.rows = rows, call.inputs = inputs, call.outputs = outputs;
    failed |= find<int(const Linear*, int64_t, Parallel)>("protea_linear")(&call, threads, parallel);

    double* exact = new double[rows * outputs];
    for (int64_t r = 0; r < rows; r++) {
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < inputs; i++) mean += x[r * inputs + i] / double(inputs);
        for (int64_t i = 0; i < inputs; i++) variance += std::pow(x[r * inputs + i] - mean, 2) / double(inputs);
        for (int64_t o = 0; o < outputs; o++) {
            double sum = bias[o];
            for (int64_t i = 0; i < inputs; i++) {
                const double normed = (x[r * inputs + i] - mean) / std::sqrt(variance + 1e-5) * norm[i] + shift[i];
                sum += normed * weight[o * inputs + i];
            }
            exact[r * outputs + o] = sum * std::erfc(-sum / std::sqrt(2.0)) / 2 + residual[r * outputs + o];
        }
    }
    compare("linear", y, exact, size_t(rows * outputs));
}

// ---- attention of two sequences, forward and backward ----

static void check_attention(const int32_t (&cu)[3], int64_t heads, int64_t width, int64_t threads) {
    const int64_t tokens = cu[2], row = heads * width;
    const size_t size = size_t(tokens * row);
    const double scale = 1 / std::sqrt(double(width));
    const int32_t order[2] = {1, 0};
    const Numbers q(size), k(size), v(size), dout(size), out(size), dq(size), dk(size), dv(size), lse(tokens * heads);
    Attention call{};
    call.q = q.data, call.k = k.data, call.v = v.data, call.q_stride = call.k_stride = call.v_stride = row;
    call.out = out.data, call.out_stride = row, call.lse = lse.data, call.dout = dout.data;
    call.dq = dq.data, call.dk = dk.data, call.dv = dv.data, call.cu_q = call.cu_k = cu, call.order = order;
    call.sequences = 2, call.heads = heads, call.width = width, call.scale = scale;
    using Function = int(const Attention*, int64_t, Parallel);
    failed |= find<Function>("protea_attention_forward")(&call, threads, parallel);
    failed |= find<Function>("protea_attention_backward")(&call, threads, parallel);

    double *exact = new double[4 * size](), *exact_dq = exact + size, *exact_dk = exact + 2 * size;
    double *exact_dv = exact + 3 * size, *p = new double[tokens], *dp = new double[tokens];
    for (int64_t b = 0; b < 2; b++)
        for (int64_t i = cu[b]; i < cu[b + 1]; i++)
            for (int64_t at = 0; at < row; at += width) {
                double total = 0, weighted = 0;
                const auto dot = [&](const Numbers& a, const Numbers& c, int64_t j) {
                    double sum = 0;
                    for (int64_t w = at; w < at + width; w++) sum += double(a[i * row + w]) * c[j * row + w];
                    return sum;
                };
                for (int64_t j = cu[b]; j < cu[b + 1]; j++) total += p[j] = std::exp(scale * dot(q, k, j));
                for (int64_t j = cu[b]; j < cu[b + 1]; j++) {
                    p[j] /= total, dp[j] = dot(dout, v, j), weighted += p[j] * dp[j];
                    for (int64_t w = at; w < at + width; w++) {
                        exact[i * row + w] += p[j] * v[j * row + w];
                        exact_dv[j * row + w] += p[j] * dout[i * row + w];
                    }
                }
                for (int64_t j = cu[b]; j < cu[b + 1]; j++) {
                    const double ds = scale * p[j] * (dp[j] - weighted);
                    for (int64_t w = at; w < at + width; w++) {
                        exact_dq[i * row + w] += ds * k[j * row + w];
                        exact_dk[j * row + w] += ds * q[i * row + w];
                    }
                }
            }
    compare("attention", out, exact, size);
    compare("gradient-q", dq, exact_dq, size);
    compare("gradient-k", dk, exact_dk, size);
    compare("gradient-v", dv, exact_dv, size);
}

int main(int count, char** arguments) {
    library = count > 1 ? dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!library) return fprintf(stderr, "%s\n", count > 1 ? dlerror() : "no library is named"), 2;
    const char* name = find<const char*()>("protea_instruction_set")();
    if (!name || (count > 2 && find<int(const char*)>("protea_use")(arguments[2]))) return puts("refused"), 3;
    printf("version %d\nset %s\n", find<int()>("protea_version")(), find<const char*()>("protea_instruction_set")());
    for (int64_t threads = 1; threads <= 2; threads++) {
        check_linear(37, 41, 75, threads);
        check_linear(5, 320, 33, threads);
        check_attention({0, 19, 62}, 2, 16, threads);
        check_attention({0, 1, 40}, 1, 72, threads);
    }
    return failed;
}
