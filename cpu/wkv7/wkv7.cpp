// The RWKV-7 recurrence on CPUs, forward and backward.
//
// It computes ("Goose", Peng et al. 2025, arXiv 2503.14456) for each sequence and head, with S a matrix of head_size
// rows (values) and columns (keys), and d_t = exp(-e^(-1/2) sigmoid(w_t)) the decay:
//
//     S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T
//     y_t = S_t r_t
//
// 1. Chunks of 8 steps (chunk.h): a step's cost for the state does not depend on the chunk's length, but its cost for
//    the other steps grows with it. With c_t the product of the decays since the chunk's start, the chunk's reads are
//    left = [a_t c_{t-1}; r_t c_t] and its writes right = [b_t / c_t; k_t / c_t]: the read at i takes the write at j
//    times left_i . right_j, and S left_i of the state before the chunk. No decay is below 0.545, so 1 / c stays below
//    130. The values written with b, u_t = S_{t-1} a_t, depend on each other: a unit triangular system (triangles.h).
// 2. All else is products of 16 rows with a matrix of head_size (panels.h), inside the kernel with rows of S and of its
//    gradient the keys: reads = left S, then S <- diag(c) (S + right^T [u; v]).
// 3. Backward, in tiles of 64 steps (backward.h): forward saves S at the start of each, backward recomputes S and u
//    chunk by chunk, never stepping a state back, which would divide errors by decays. With D the gradient of S, faded
//    by the chunk's decays, the gradients of u and v are right D and triangular sums, with a transposed solve; those
//    of left [x; gy] S^T and of right [u; v] D^T, and triangular sums again; then D <- D + left^T [x; gy].
// 4. A decay's logarithm is part of c from its step on: its gradient is a sum over later reads, less later writes, plus
//    the products of S's elements at the chunk's end with D's, summed over the values.
// 5. A head's rows are too far apart for the processor to prefetch them: products prefetch the next chunk's, or, in
//    backward, the places of the tile's gradients and the inputs of the tile before.
//
// Parallel over sequences and heads, and if there are more threads, over the values of a head. Head sizes are padded
// with zeros to multiples of 16.
#include <algorithm>
#include <memory>
#include <new>

#include "common/denormals.h"
#include "common/dispatch.h"
#include "common/threads.h"
#include "wkv7/arguments.h"
#include "wkv7/backward.h"

namespace {

constexpr int64_t kStepsForThreads = 1 << 18;  // state elements x steps below which waking a thread costs more

template <class T>
T* offset(const void* base, int64_t elements) {
    return base ? static_cast<T*>(const_cast<void*>(base)) + elements : nullptr;
}

// The split of a call: head after head, sequence after sequence; a head into `parts` parts by its values.
struct Place {
    Task task;
    int64_t first, index, saved;  // elements into r (and its like), the states, the checkpoints
    int part;
};

Place place(const Arguments& a, int64_t number, int parts) {
    const int part = static_cast<int>(number % parts);
    number /= parts;
    const int64_t head = number % a.heads, sequence = number / a.heads, even = a.tokens / a.sequences;
    const int64_t begin = a.cu_seqlens ? a.cu_seqlens[sequence] : sequence * even;
    const int64_t end = a.cu_seqlens ? a.cu_seqlens[sequence + 1] : begin + even;
    const int64_t n = a.head_size, size = n * n, N = round_up(n, 16);
    const Range values = share(N / 16, part, parts);
    const int64_t value = values.begin * 16, W = values.end * 16 - value;
    // A sequence saves one state less than it has tiles, so that counting from begin / kTile never overlaps.
    return {{end - begin, n, N, a.heads * size, {value, std::min(W, n - value), W}},
            (begin * a.heads + head) * n,
            number * size,
            (begin / kTile * a.heads + head) * size,
            part};
}

// The number of parts of a head: one, unless there are more threads than heads. Each part repeats the work that the
// values share.
int parts_of_a_head(const Arguments& a) {
    const int64_t heads = a.sequences * a.heads, work = a.tokens * a.heads * a.head_size * a.head_size;
    if (work < kStepsForThreads) return 1;
    return static_cast<int>(std::max<int64_t>(1, std::min(a.threads / heads, round_up(a.head_size, 16) / 16)));
}

template <class E>
Rows<const E> inputs(const Arguments& a, int64_t first) {
    return {in<E>(a.r) + first, in<E>(a.w) + first, in<E>(a.k) + first,   in<E>(a.v) + first,
            in<E>(a.a) + first, in<E>(a.b) + first, a.heads * a.head_size};
}

// run(memory, place) for each part of each head of each sequence, with `floats` floats for each thread -> false if
// there is no memory for them.
template <class Run>
bool for_each_part(const Arguments& a, int parts, int64_t floats, const Run& run) {
    const int64_t tasks = a.sequences * a.heads * parts, work = a.tokens * a.heads * a.head_size * a.head_size;
    const int threads = work < kStepsForThreads ? 1 : static_cast<int>(std::min<int64_t>(a.threads, tasks));
    bool failed = false;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(|| : failed) if (threads > 1)
    for (int64_t number = 0; number < tasks; number++) {
        const FlushDenormals flush;
        static thread_local Workspace workspace;
        float* memory = static_cast<float*>(workspace.get(floats * sizeof(float)));
        failed = failed || !memory;
        if (!failed) run(memory, place(a, number, parts));
    }
    return !failed;
}

template <class E>
bool forward_all(const Arguments& a) {
    const int64_t floats = ForwardWork::floats(round_up(a.head_size, 16));
    return for_each_part(a, parts_of_a_head(a), floats, [&](float* memory, const Place& at) {
        forward_head<E>(memory, at.task, inputs<E>(a, at.first), offset<float>(a.state, at.index),
                        out<E>(a.y) + at.first, a.final_state + at.index, offset<float>(a.checkpoints, at.saved));
    });
}

// to(part): the place of that part's gradients.
template <class E, class To>
bool backward_parts(const Arguments& a, int parts, const To& to) {
    const int64_t floats = BackwardWork::floats(round_up(a.head_size, 16));
    return for_each_part(a, parts, floats, [&](float* memory, const Place& at) {
        auto rows = to(at.part);
        for (auto** row : {&rows.r, &rows.w, &rows.k, &rows.v, &rows.a, &rows.b}) *row += at.first;
        backward_head(memory, at.task, inputs<E>(a, at.first), offset<float>(a.state, at.index),
                      offset<float>(a.checkpoints, at.saved), offset<E>(a.gy, at.first),
                      offset<float>(a.gfinal, at.index), rows, a.gstate + at.index);
    });
}

template <class E>
bool backward_all(const Arguments& a) {
    const int parts = parts_of_a_head(a);
    const int64_t stride = a.heads * a.head_size, size = a.tokens * stride;
    const Rows<E> result{out<E>(a.gr), out<E>(a.gw), out<E>(a.gk), out<E>(a.gv), out<E>(a.ga), out<E>(a.gb), stride};
    if (parts == 1) return backward_parts<E>(a, parts, [&](int) { return result; });
    // Each part has its own values of v's gradient; the other gradients are sums over the parts, added up here.
    const std::unique_ptr<float[]> shares(new (std::nothrow) float[size * (5 * parts + 1)]);
    if (!shares) return false;
    float* const gv = shares.get() + size * 5 * parts;
    const bool done = backward_parts<E>(a, parts, [&](int part) {
        float* own = shares.get() + size * 5 * part;
        return Rows<float>{own, own + size, own + 2 * size, gv, own + 3 * size, own + 4 * size, stride};
    });
    E* const results[] = {result.r, result.w, result.k, result.a, result.b};
    parallel(size, size, a.threads, [&](int64_t begin, int64_t end, int) {
        for (int i = 0; i < 5; i++)
            for (int64_t x = begin; x < end; x++) {
                float sum = 0.0f;
                for (int part = 0; part < parts; part++) sum += shares.get()[size * (5 * part + i) + x];
                results[i][x] = from_float<E>(sum);
            }
        for (int64_t x = begin; x < end; x++) result.v[x] = from_float<E>(gv[x]);
    });
    return done;
}

}  // namespace

extern "C" {

// Both return 0, or 1 if there is no memory for work buffers.
int wkv7_cpu_forward(const Arguments* a) {
    return !by_type(a->bfloat16, [=](auto element) { return forward_all<decltype(element)>(*a); });
}

int wkv7_cpu_backward(const Arguments* a) {
    return !by_type(a->bfloat16, [=](auto element) { return backward_all<decltype(element)>(*a); });
}
}
