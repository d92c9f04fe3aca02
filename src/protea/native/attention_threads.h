// How threads share the attention of a pack: by heads of sequences, and pieces of the longest.

#pragma once

#include "attention.h"
#include "attention_bf16.h"

inline int64_t pieces(int64_t rows) { return (rows + TASK_ROWS - 1) / TASK_ROWS; }

struct AttentionWork : Queue {
    const Attention& call;
    bool (*forward)(const Attention&, const Head&, int64_t, int64_t);
    bool (*backward)(const Attention&, const Head&, int64_t, int64_t, int64_t, int64_t, bool, bool);
    int64_t threads, all_scores = 0;

    int64_t scores(int64_t b) const {
        return int64_t(call.cu_q[b + 1] - call.cu_q[b]) * (call.cu_k[b + 1] - call.cu_k[b]);
    }

    // Whether one head of a sequence is so large a part of the work that other threads would wait for it. Its gradients
    // are then computed in pieces, separately for queries and keys, with 7 products instead of 5.
    bool is_split(int64_t b) const {
        const int64_t own = scores(b);
        return threads > 1 && own > TASK_ROWS * TASK_ROWS && 2 * own * threads > all_scores * call.heads;
    }

    int64_t pieces_of(int64_t b) const {
        const int64_t of_queries = pieces(call.cu_q[b + 1] - call.cu_q[b]);
        if (forward) return of_queries;
        return is_split(b) ? of_queries + pieces(call.cu_k[b + 1] - call.cu_k[b]) : 1;
    }

    bool run_piece(const Head& task, int64_t piece) const {
        const int64_t row = piece * TASK_ROWS;
        if (forward) return forward(call, task, row, least(task.lq, row + TASK_ROWS));
        if (!is_split(task.sequence)) return backward(call, task, 0, task.lq, 0, task.lk, true, true);
        if (piece < pieces(task.lq))
            return backward(call, task, row, least(task.lq, row + TASK_ROWS), 0, task.lk, true, false);
        const int64_t key = row - pieces(task.lq) * TASK_ROWS;
        return backward(call, task, 0, task.lq, key, least(task.lk, key + TASK_ROWS), false, true);
    }

    // Takes pieces until none is left; a piece has one number among those of all heads of all sequences.
    void run() {
        int64_t task = take(), first = 0;
        for (int64_t i = 0; i < call.sequences; i++) {
            const int64_t b = call.order[i], each = pieces_of(b), last = first + each * call.heads;
            for (; task < last; task = take())
                if (!run_piece(Head(call, b, (task - first) / each), (task - first) % each)) fail();
            first = last;
        }
        finish_streams();
        give_back();
    }
};

inline int run_attention(AttentionWork& work, Parallel parallel) {
    auto thread = [](void* data) { static_cast<AttentionWork*>(data)->run(); };
    for (int64_t b = 0; b < work.call.sequences; b++) work.all_scores += work.scores(b);
    if (work.threads > 1 && parallel)
        parallel(thread, &work, unsigned(work.threads), 0);
    else
        thread(&work);
    return work.failed;
}

inline int attention_forward(const Attention* call, int64_t threads, Parallel parallel) {
    AttentionWork work{{}, *call, forward_task, nullptr, threads};
#if defined(__AVX512BF16__)
    if (call->type == BFLOAT16) work.forward = narrow::forward_task;
#endif
    return run_attention(work, parallel);
}

inline int attention_backward(const Attention* call, int64_t threads, Parallel parallel) {
    AttentionWork work{{}, *call, nullptr, backward_task, threads};
#if defined(__AVX512BF16__)
    if (call->type == BFLOAT16) work.backward = narrow::backward_task;
#endif
    return run_attention(work, parallel);
}
