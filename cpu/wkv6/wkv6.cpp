// The RWKV-6 recurrence on CPUs, forward and backward.
//
// It computes (Peng et al. 2024, arXiv 2404.05892, eq. 19) for each sequence and head, with S a matrix of head_size
// rows (keys) and head_size columns (values), and d_t = exp(-exp(w_t)) the decay:
//
//     y_t = S_{t-1}^T r_t + (sum_i r_t[i] u[i] k_t[i]) v_t
//     S_t = diag(d_t) S_{t-1} + k_t v_t^T
//
// Done step by step, S (16 KB for head size 64) would pass through the processor's ports three times a step: read,
// decay, write. The kernel keeps that traffic in registers and saves most decays:
//
// 1. Chunks of 8 steps, in two halves of 4. Inside a half, let R_i = r_i d_0 ... d_{i-1}, K_j = k_j d_{j+1} ... d_3,
// and
//    W = d_0 d_1 d_2 d_3. Then with S the state before the half
//        y_i = S^T R_i + sum_{j <= i} A_ij v_j,      A_ij = sum_c r_i[c] k_j[c] d_{j+1}[c] ... d_{i-1}[c]  (j < i)
//        S  <- diag(W) S + sum_j K_j v_j^T           A_ii = sum_c r_i[c] u[c] k_i[c]
//    Two halves join into one such formula for the whole chunk: R of the second is multiplied by W of the first, K of
//    the first by W of the second, and a step i of the second reads a step j of the first by A_ij = sum_c R_i[c]
//    K_j[c], R and K as they were in their halves. So one multiplication by W stands for eight, and every factor is a
//    product of numbers at most 1: nothing overflows, however strong the decay. "Prepare" computes R, K, W and A.
//    (Chunks of 4 or 16 cost more: the former decays, the latter pairs.)
// 2. Spans of 16 steps, which fit in the processor's first cache together with S. A block of S (8 rows of 32 lanes with
//    AVX-512) is loaded into registers, walks through the chunks of a span, and is stored again: forward_pass. Most
//    time is spent in its multiply-adds.
// 3. Backward, in tiles of 64 steps: forward saves S at the start of each. The gradient D of S obeys the mirrored
//    recurrence
//        D_{t-1} = diag(d_t) D_t + r_t gy_t^T
//    backward in time. Tile by tile, from the last: run S^T forward through the tile again for P_i = S gy_i, the part
//    of r's gradient that comes through the state (state_pass, rows now values and lanes keys); then span by span from
//    the last, run D^T backward for Q_j = D v_j and for gv_j = D^T K_j (gradient_pass), and combine P and Q with the
//    terms inside a chunk (finish_chunk).
// 4. The decay's gradient. dL / d log d_t = sum over everything that is written before t and read after t. For writes
//    and reads in the chunk of t these are P, Q and A's gradient; those across the whole chunk give W <S, D> for each
//    key, S before the chunk and D after it. S at every chunk is kept for one tile, so that gradient_pass can take that
//    product while D is in registers. (Carrying <S, D> from chunk to chunk instead, by subtracting writes and adding
//    reads, would be cheaper and lose a digit: a strong decay leaves a small difference of large sums.) The second
//    half's reads of the state before the chunk also pass through the first half, and the first half's writes for later
//    chunks through the second; finish_chunk adds these, and never subtracts.
//
// Parallel over sequences, heads and, if these are fewer than the threads, blocks of value columns: columns of S do not
// interact, and the gradients of r, k, w and u are sums over columns, which are added up at the end.
//
// Head sizes are padded with zeros to 64, which released models have, or to 128; zeros add nothing to a sum.
//
// Files: rows.h has rows of tensors and of floats; prepare.h R, K, W and A; block.h a block of a state in registers;
// forward.h and backward.h one head of one sequence, passes.h what backward runs over a tile; tasks.h the split among
// threads; this file all heads of all sequences, and the C interface.
#include <cstdlib>
#include <type_traits>

#include "common/denormals.h"
#include "common/dispatch.h"
#include "common/scratch.h"
#include "wkv6/arguments.h"
#include "wkv6/backward.h"
#include "wkv6/forward.h"
#include "wkv6/tasks.h"

namespace {

template <int N, class Element>
bool forward_all(const Arguments& a) {
    const Plan p = plan(a);
    bool failed = false;
#pragma omp parallel for schedule(dynamic) num_threads(p.threads) reduction(|| : failed) if (p.threads > 1)
    for (int64_t number = 0; number < p.tasks; number++) {
        const FlushDenormals flush;
        auto* work = thread_work<ForwardWork<N>>();
        failed = failed || !work;
        if (failed) continue;
        const Place at = place(a, p, number);
        forward_head<N, Element>(*work, at.task, offset<Element>(a.r, at.first), offset<Element>(a.k, at.first),
                                 offset<Element>(a.v, at.first), offset<Element>(a.w, at.first),
                                 a.u + at.head * a.head_size, offset<float>(a.state, at.index),
                                 offset<Element>(a.y, at.first), a.final_state + at.index,
                                 offset<float>(a.checkpoints, at.saved));
    }
    return !failed;
}

template <int N, class Element, class Gradient>
bool backward_tasks(const Arguments& a, const Plan& p, float* gu, Gradient* gr, Gradient* gk, Gradient* gw,
                    int64_t block_stride) {
    bool failed = false;
#pragma omp parallel for schedule(dynamic) num_threads(p.threads) reduction(|| : failed) if (p.threads > 1)
    for (int64_t number = 0; number < p.tasks; number++) {
        const FlushDenormals flush;
        auto* work = thread_work<BackwardWork<N>>();
        failed = failed || !work;
        if (failed) continue;
        const Place at = place(a, p, number);
        const int64_t gradient = at.block * block_stride + at.first;
        const Gradients<Element, Gradient> to{gr + gradient,
                                              gk + gradient,
                                              gw + gradient,
                                              at.task.stride,
                                              offset<Element>(a.gv, at.first),
                                              gu + number * a.head_size,
                                              a.gstate + at.index};
        backward_head<N, Element, Gradient>(*work, at.task, offset<Element>(a.r, at.first),
                                            offset<Element>(a.k, at.first), offset<Element>(a.v, at.first),
                                            offset<Element>(a.w, at.first), a.u + at.head * a.head_size,
                                            offset<float>(a.state, at.index), offset<float>(a.checkpoints, at.saved),
                                            offset<Element>(a.gy, at.first), offset<float>(a.gfinal, at.index), to);
    }
    return !failed;
}

template <class Element>
void add_blocks(Element* to, const float* from, int64_t size, int blocks) {
    for (int64_t i = 0; i < size; i++) {
        float sum = from[i];
        for (int b = 1; b < blocks; b++) sum += from[b * size + i];
        to[i] = from_float<Element>(sum);
    }
}

template <int N, class Element>
bool backward_all(const Arguments& a) {
    const Plan p = plan(a);
    const int64_t size = a.tokens * a.heads * a.head_size;
    const int64_t partial_size = p.blocks > 1 ? 3 * p.blocks * size : 0;
    float* scratch = static_cast<float*>(malloc(sizeof(float) * (p.tasks * a.head_size + partial_size)));
    if (!scratch) return false;
    float* gu = scratch;  // (sequences, heads, blocks, head_size)
    bool done;
    if (p.blocks == 1) {
        done = backward_tasks<N, Element, Element>(a, p, gu, offset<Element>(a.gr, 0), offset<Element>(a.gk, 0),
                                                   offset<Element>(a.gw, 0), 0);
    } else {
        float* gr = scratch + p.tasks * a.head_size;
        float *gk = gr + p.blocks * size, *gw = gk + p.blocks * size;
        done = backward_tasks<N, Element, float>(a, p, gu, gr, gk, gw, size);
        add_blocks(offset<Element>(a.gr, 0), gr, size, p.blocks);
        add_blocks(offset<Element>(a.gk, 0), gk, size, p.blocks);
        add_blocks(offset<Element>(a.gw, 0), gw, size, p.blocks);
    }
    const int64_t per_sequence = a.heads * p.blocks * a.head_size;
    for (int64_t h = 0; h < a.heads; h++)
        for (int64_t c = 0; c < a.head_size; c++) {
            float sum = 0.0f;
            for (int64_t s = 0; s < a.sequences; s++)
                for (int b = 0; b < p.blocks; b++) sum += gu[s * per_sequence + (h * p.blocks + b) * a.head_size + c];
            a.gu[h * a.head_size + c] = sum;
        }
    free(scratch);
    return done;
}

// call(size), a constant whose value is the head size with its padding.
template <class Call>
bool by_head_size(int64_t head_size, const Call& call) {
    if (head_size <= 64) return call(std::integral_constant<int, 64>{});
    return call(std::integral_constant<int, 128>{});
}

}  // namespace

extern "C" {

// Both return 0, or 1 if there is no memory for work buffers.
int wkv6_cpu_forward(const Arguments* a) {
    return !by_type(a->bfloat16, [=](auto element) {
        return by_head_size(a->head_size, [=](auto size) { return forward_all<size, decltype(element)>(*a); });
    });
}

int wkv6_cpu_backward(const Arguments* a) {
    return !by_type(a->bfloat16, [=](auto element) {
        return by_head_size(a->head_size, [=](auto size) { return backward_all<size, decltype(element)>(*a); });
    });
}
}
