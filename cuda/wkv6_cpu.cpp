// The RWKV-6 recurrence on CPUs, forward and backward.
//
// What it computes (Peng et al. 2024, arXiv 2404.05892, eq. 19), for each sequence and head, S a matrix of head_size
// rows (keys) and head_size columns (values), d_t = exp(-exp(w_t)) the decay:
//
//     y_t = S_{t-1}^T r_t + (sum_i r_t[i] u[i] k_t[i]) v_t
//     S_t = diag(d_t) S_{t-1} + k_t v_t^T
//
// Done step by step, S (16 KB for head size 64) would pass through the processor's ports three times a step: read,
// decay, write. The kernel keeps that traffic in registers and saves most decays:
//
// 1. Chunks of 4 steps. Inside one, let R_i = r_i d_0 ... d_{i-1}, K_j = k_j d_{j+1} ... d_3, and W = d_0 d_1 d_2 d_3.
//    Then with S the state before the chunk
//        y_i = S^T R_i + sum_{j <= i} A_ij v_j,      A_ij = sum_c r_i[c] k_j[c] d_{j+1}[c] ... d_{i-1}[c]  (j < i)
//        S  <- diag(W) S + sum_j K_j v_j^T           A_ii = sum_c r_i[c] u[c] k_i[c]
//    so that one multiplication by W stands for four, and every factor is a product of numbers at most 1: nothing
//    overflows, however strong the decay. "Prepare" computes R, K, W and A.
// 2. Spans of 16 steps, which fit in the processor's first cache together with S. A block of S (8 rows of 32 lanes with
//    AVX-512) is loaded into registers, walks through the 4 chunks of a span, and is stored again: forward_pass. Most time
//    is spent in its multiply-adds.
// 3. Backward, in tiles of 64 steps: forward saves S at the start of each. The gradient D of S obeys the mirrored
//    recurrence
//        D_{t-1} = diag(d_t) D_t + r_t gy_t^T
//    backward in time. Tile by tile, from the last: run S^T forward through the tile's spans again for P_i = S gy_i, the
//    part of r's gradient that comes through the state (state_pass, rows now values and lanes keys); then span by span
//    from the last, run D^T backward for Q_j = D v_j and for gv_j = D^T K_j (gradient_pass), and combine P and Q with what
//    happens inside a chunk (finish_chunk).
// 4. The decay's gradient. dL / d log d_t = sum over everything that is written before t and read after t. For writes
//    and reads in the chunk of t these are P, Q and A's gradient; what passes through the whole chunk is W <S, D> for
//    each key, S before the chunk and D after it. S at every chunk is kept for one tile, so that gradient_pass can take
//    that product where D lies in registers. (Carrying <S, D> from chunk to chunk instead, by subtracting what is written
//    and adding what is read, would be cheaper and lose a digit: a strong decay leaves a small difference of large sums.)
//
// Parallel over sequences, heads and, where these are fewer than the threads, blocks of value columns: columns of S do
// not interact, and the gradients of r, k, w and u are sums over columns, which are added up at the end.
//
// Head sizes are padded with zeros to 16, 32, 64 or 128. WKV6_LEVEL names the instruction set that this copy is for.
#include "wkv6_cpu.h"

#include <cstdlib>
#include <initializer_list>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "wkv6_cpu_vector.h"

namespace wkv6 {
namespace WKV6_LEVEL {
namespace {

constexpr int kTile = 64;                      // steps from one checkpoint to the next
constexpr int kSpan = 16;                      // steps that are prepared and computed at once
constexpr int kChunk = 4;
constexpr int kChunks = kTile / kChunk;
constexpr int kSpanChunks = kSpan / kChunk;
constexpr int kPairs = kChunk * kChunk;        // A of one chunk, column j at j * kChunk
constexpr int kSmallestValueBlock = 16;        // columns of S that are worth a task of their own
constexpr float kNoDecay = -87.0f;             // w of a step past the end: d is exactly 1, its gradient about 0
constexpr float kLargestExponent = 87.0f;      // exp of it is finite, exp of minus it a normal number
constexpr int64_t kWorkForThreads = 1 << 18;   // state elements x steps below which waking a thread costs more

struct Range {
    int begin, end;
};

// The shape of a block of S in registers, for a pass over `width` lanes.
constexpr int block_vectors(int width) { return width / kLanes < 2 ? width / kLanes : 2; }
constexpr int block_rows(int vectors) { return kAccumulators / vectors < 8 ? kAccumulators / vectors : 8; }

// ---- rows of tensors <-> rows of floats -----------------------------------------------------------------------------

// `steps` rows of n elements, `stride` apart, become kChunk rows of N floats; what lies beyond is `filler` in time, 0 in
// channels.
template <int N, class Element>
void pad_rows(float* to, const Element* from, int64_t stride, int steps, int n, float filler = 0.0f) {
    for (int t = 0; t < kChunk; t++) {
        float* row = to + t * N;
        const int present = t < steps ? n : 0;
        for (int c = 0; c < present; c++) row[c] = to_float(from[t * stride + c]);
        for (int c = present; c < N; c++) row[c] = t < steps ? 0.0f : filler;
    }
}

// kChunk rows of N elements, `stride` apart, become floats side by side; null is all zeros.
template <int N, class Element>
INLINE void copy_rows(float* to, const Element* from, int64_t stride) {
    UNROLL for (int t = 0; t < kChunk; t++)
        UNROLL for (int c = 0; c < N; c += kLanes) store(to + t * N + c, from ? load(from + t * stride + c) : zero());
}

template <int N, class Element>
void store_rows(Element* to, const float* from, int64_t stride, int steps, Range columns) {
    for (int t = 0; t < steps; t++) {
        int c = columns.begin;
        for (; c + kLanes <= columns.end; c += kLanes) store(to + t * stride + c, load(from + t * N + c));
        for (; c < columns.end; c++) to[t * stride + c] = from_float<Element>(from[t * N + c]);
    }
}

// A state of n rows and columns in memory <-> one of N, zeros beyond n; null is all zeros.
template <int N>
void load_state(float* S, const float* from, int n) {
    if (!from || n < N) memset(S, 0, sizeof(float) * N * N);
    if (!from) return;
    for (int i = 0; i < n; i++) memcpy(S + i * N, from + i * n, sizeof(float) * n);
}

template <int N>
void load_transposed_state(float* S, const float* from, int n) {
    if (!from || n < N) memset(S, 0, sizeof(float) * N * N);
    if (from) transpose(S, N, from, n, n);
}

template <int N>
void store_state(float* to, const float* S, int n, Range columns) {
    const int end = columns.end < n ? columns.end : n;
    for (int i = 0; i < n && columns.begin < end; i++)
        memcpy(to + i * n + columns.begin, S + i * N + columns.begin, sizeof(float) * (end - columns.begin));
}

// ---- preparing a chunk ----------------------------------------------------------------------------------------------

// exp(w) and the decay exp(-exp(w)).
struct Decays {
    Vec e, d;
};

INLINE Decays decays(Vec w) {
    const Vec e = exp_bounded(at_most(at_least(w, -kLargestExponent), kLargestExponent));
    return {e, exp_bounded(-at_most(e, kLargestExponent))};
}

// The lower triangle of a chunk's pairs, a[i][j] for j <= i, each summed over its lanes -> A.
INLINE void store_pairs(float* A, const Vec a[kChunk][kChunk]) {
    Vec quads[4] = {quad_sums(a[0][0], a[1][0], a[2][0], a[3][0]), quad_sums(zero(), a[1][1], a[2][1], a[3][1]),
                    quad_sums(zero(), zero(), a[2][2], a[3][2]), quad_sums(zero(), zero(), zero(), a[3][3])};
    Vec4 columns[4];
    sums_of_quads(quads, columns);
    UNROLL for (int j = 0; j < kChunk; j++) store4(A + j * kChunk, columns[j]);
}

// Where prepare leaves what the passes need, and with kKeepDecays d and e for the end of backward.
struct Prepared {
    float *R, *K, *W, *A, *d, *e;
};

// r k w (kChunk rows of N elements, `stride` apart) and u -> R, K, d, e (kChunk rows of N floats), W (one row), A (kPairs).
template <int N, bool kKeepDecays, class Element>
INLINE void prepare(const Element* r, const Element* k, const Element* w, int64_t stride, const float* u,
                    const Prepared& to) {
    Vec a[kChunk][kChunk];
    UNROLL for (int i = 0; i < kChunk; i++) UNROLL for (int j = 0; j <= i; j++) a[i][j] = zero();
    for (int c = 0; c < N; c += kLanes) {
        Vec d[kChunk];
        UNROLL for (int i = 0; i < kChunk; i++) {
            const Decays found = decays(load(w + i * stride + c));
            d[i] = found.d;
            if (kKeepDecays) {
                store(to.d + i * N + c, found.d);
                store(to.e + i * N + c, found.e);
            }
        }
        const Vec r0 = load(r + c), r1 = load(r + stride + c), r2 = load(r + 2 * stride + c), r3 = load(r + 3 * stride + c);
        const Vec k0 = load(k + c), k1 = load(k + stride + c), k2 = load(k + 2 * stride + c), k3 = load(k + 3 * stride + c);
        const Vec bonus = load(u + c);
        const Vec d01 = d[0] * d[1], d23 = d[2] * d[3];
        const Vec k0_1 = k0 * d[1], k0_12 = k0_1 * d[2], k1_2 = k1 * d[2];  // k0_1: k_0 as decayed by step 1

        a[0][0] += r0 * (bonus * k0);
        a[1][1] += r1 * (bonus * k1);
        a[2][2] += r2 * (bonus * k2);
        a[3][3] += r3 * (bonus * k3);
        a[1][0] += r1 * k0;
        a[2][1] += r2 * k1;
        a[3][2] += r3 * k2;
        a[2][0] += r2 * k0_1;
        a[3][1] += r3 * k1_2;
        a[3][0] += r3 * k0_12;

        store(to.R + c, r0);
        store(to.R + N + c, r1 * d[0]);
        store(to.R + 2 * N + c, r2 * d01);
        store(to.R + 3 * N + c, r3 * (d01 * d[2]));
        store(to.K + c, k0_12 * d[3]);
        store(to.K + N + c, k1_2 * d[3]);
        store(to.K + 2 * N + c, k2 * d[3]);
        store(to.K + 3 * N + c, k3);
        store(to.W + c, d01 * d23);
    }
    store_pairs(to.A, a);
}

// ---- fetching ahead -------------------------------------------------------------------------------------------------

// Rows of memory that will be needed soon, brought into the second cache a few at a time while a pass computes: a head's
// rows lie too far apart for the processor to foresee them, and the first cache is the pass's.
class Ahead {
  public:
    // `steps` rows of n elements, `stride` elements apart.
    template <class Element>
    void add(const Element* rows, int64_t stride, int64_t steps, int n) {
        if (!rows || steps <= 0) return;
        part_[parts_++] = {reinterpret_cast<const char*>(rows), stride * int64_t(sizeof(Element)), steps,
                           n * int64_t(sizeof(Element))};
    }

    // Fetches the next `count` rows of each.
    INLINE void fetch(int count) {
        for (int i = 0; i < parts_; i++) {
            Part& part = part_[i];
            for (int t = 0; t < count && part.steps > 0; t++, part.steps--, part.row += part.stride)
                for (int64_t byte = 0; byte < part.bytes; byte += 64) __builtin_prefetch(part.row + byte, 0, 2);
        }
    }

  private:
    struct Part {
        const char* row;
        int64_t stride, steps, bytes;
    };
    Part part_[10];
    int parts_ = 0;
};

// ---- a block of a state in registers --------------------------------------------------------------------------------

// kRows rows of kVectors vectors, from a state whose rows have N lanes, as have the arrays' rows below. An array that goes
// with rows points at the block's first row, one that goes with lanes at its first lane.
template <int N, int kRows, int kVectors>
struct Block {
    static constexpr int kRowsHigh = kRows, kLanesWide = kVectors * kLanes;
    Vec s[kRows][kVectors];

    INLINE void load_from(const float* S) {
        UNROLL for (int a = 0; a < kRows; a++) UNROLL for (int b = 0; b < kVectors; b++) s[a][b] = load(S + a * N + b * kLanes);
    }
    INLINE void store_to(float* S) const {
        UNROLL for (int a = 0; a < kRows; a++) UNROLL for (int b = 0; b < kVectors; b++) store(S + a * N + b * kLanes, s[a][b]);
    }

    // out_i[lane] += sum over rows of factors_i[row] S[row][lane], for the kChunk rows of `factors` and `out`.
    INLINE void read(const float* factors, float* out) const {
        UNROLL for (int i = 0; i < kChunk; i++) read_step(factors + i * N, out + i * N);
    }
    INLINE void read_step(const float* factors, float* out) const {
        Vec sum[kVectors];
        UNROLL for (int b = 0; b < kVectors; b++) sum[b] = load(out + b * kLanes);
        UNROLL for (int a = 0; a < kRows; a++) {
            const Vec factor = broadcast(factors[a]);
            UNROLL for (int b = 0; b < kVectors; b++) sum[b] += factor * s[a][b];
        }
        UNROLL for (int b = 0; b < kVectors; b++) store(out + b * kLanes, sum[b]);
    }

    INLINE void decay_rows(const float* W) {
        UNROLL for (int a = 0; a < kRows; a++) {
            const Vec factor = broadcast(W[a]);
            UNROLL for (int b = 0; b < kVectors; b++) s[a][b] *= factor;
        }
    }
    INLINE void decay_lanes(const float* W) {
        UNROLL for (int b = 0; b < kVectors; b++) {
            const Vec factor = load(W + b * kLanes);
            UNROLL for (int a = 0; a < kRows; a++) s[a][b] *= factor;
        }
    }

    // S[row][lane] += sum over the chunk's steps of factors_j[row] x_j[lane].
    INLINE void write(const float* factors, const float* x) {
        UNROLL for (int j = 0; j < kChunk; j++) {
            Vec lane[kVectors];
            UNROLL for (int b = 0; b < kVectors; b++) lane[b] = load(x + j * N + b * kLanes);
            UNROLL for (int a = 0; a < kRows; a++) {
                const Vec factor = broadcast(factors[j * N + a]);
                UNROLL for (int b = 0; b < kVectors; b++) s[a][b] += factor * lane[b];
            }
        }
    }

    // sum over lanes of S[row][lane] x[lane]: each quad of rows as one vector, whose quads are to be summed.
    INLINE void dot(const float* x, Vec* quads) const {
        Vec partial[kRows];
        UNROLL for (int a = 0; a < kRows; a++) partial[a] = load(x) * s[a][0];
        UNROLL for (int b = 1; b < kVectors; b++) {
            const Vec lane = load(x + b * kLanes);
            UNROLL for (int a = 0; a < kRows; a++) partial[a] += lane * s[a][b];
        }
        UNROLL for (int a = 0; a < kRows; a += 4)
            quads[a / 4] = quad_sums(partial[a], partial[a + 1], partial[a + 2], partial[a + 3]);
    }

    // out[lane] += sum over rows of S[row][lane] other[row][lane].
    INLINE void multiply(const float* other, float* out) const {
        UNROLL for (int b = 0; b < kVectors; b++) {
            Vec sum = load(out + b * kLanes);
            UNROLL for (int a = 0; a < kRows; a++) sum += load(other + a * N + b * kLanes) * s[a][b];
            store(out + b * kLanes, sum);
        }
    }
};

// ---- forward --------------------------------------------------------------------------------------------------------

// S through `chunks` chunks: y_i += S^T R_i, then S = W S + sum_j K_j v_j^T. Rows of S are keys, lanes values.
template <int N, int kVectors>
void forward_pass(float* S, Range values, const float* R, const float* K, const float* W, const float* v, float* y,
                  int chunks, Ahead& ahead) {
    constexpr int kRows = block_rows(kVectors);
    for (int l = values.begin; l < values.end; l += kVectors * kLanes)
        for (int row = 0; row < N; row += kRows) {
            ahead.fetch(1);
            Block<N, kRows, kVectors> block;
            block.load_from(S + row * N + l);
            for (int m = 0; m < chunks; m++) {
                const int chunk = m * kChunk * N;
                block.read(R + chunk + row, y + chunk + l);
                block.decay_rows(W + m * N + row);
                block.write(K + chunk + row, v + chunk + l);
            }
            block.store_to(S + row * N + l);
        }
}

// Rows of kSteps steps, and a gap that shifts the next array against it: a processor takes a load for dependent on an earlier
// store whose address agrees in the last 12 bits, so arrays that walk in step must not lie a multiple of 4 KB apart.
template <int N, int kSteps>
struct Rows {
    alignas(64) float at[kSteps * N];
    float gap[17 * 16];
    operator float*() { return at; }
};

// ---- backward -------------------------------------------------------------------------------------------------------

// quads[j], as Block::dot leaves them -> gv_j[row], overwritten where `first`, else added to.
template <int N, int kRows>
INLINE void store_row_sums(float* gv, const Vec quads[kChunk][kRows / 4], bool first) {
    UNROLL for (int a = 0; a < kRows; a += 4) {
        Vec column[kChunk];
        Vec4 sum[kChunk];
        UNROLL for (int j = 0; j < kChunk; j++) column[j] = quads[j][a / 4];
        sums_of_quads(column, sum);
        UNROLL for (int j = 0; j < kChunk; j++) store4(gv + j * N + a, first ? sum[j] : sum[j] + load4(gv + j * N + a));
    }
}

// D's blocks are as wide as registers allow beside four rows: gv needs sums over lanes, in fours.
constexpr int gradient_vectors(int N) { return N / kLanes < kAccumulators / 4 ? N / kLanes : kAccumulators / 4; }

// Floats from the state at one chunk to the state at the next, where these are kept.
template <int N>
constexpr int kHistoryStride = N * N + 17 * 16;

template <int N>
struct BackwardWork {
    Rows<N, kTile> r, k, d, e;
    Rows<N, kTile> v, K, R, Q, gy, P, gv;
    alignas(64) float W[kChunks * N], A[kChunks * kPairs], u[N];
    alignas(64) float S[N * N], D[N * N], SD[kChunks * N], gu[N];  // S and D transposed: rows values, lanes keys
    alignas(64) float padded[4][kChunk * N];
    alignas(64) float history[kChunks * kHistoryStride<N>];  // S before each chunk
};

// The chunks of a span, by their numbers in the tile.
struct Span {
    int begin, end;
};

// S^T through a span: P_i += S gy_i, then S = W S + sum_j K_j v_j^T; history keeps S before each chunk.
template <int N>
void state_pass(BackwardWork<N>& q, Range values, Span span, Ahead& ahead) {
    using Registers = Block<N, block_rows(block_vectors(N)), block_vectors(N)>;
    for (int l = 0; l < N; l += Registers::kLanesWide)
        for (int row = values.begin; row < values.end; row += Registers::kRowsHigh) {
            ahead.fetch(1);
            Registers S;
            S.load_from(q.S + row * N + l);
            for (int m = span.begin; m < span.end; m++) {
                const int chunk = m * kChunk * N;
                S.store_to(q.history + m * kHistoryStride<N> + row * N + l);
                S.read(q.gy + chunk + row, q.P + chunk + l);
                S.decay_lanes(q.W + m * N + l);
                S.write(q.v + chunk + row, q.K + chunk + l);
            }
            S.store_to(q.S + row * N + l);
        }
}

// D^T backward through a span: Q_j += D v_j, gv_j = D^T K_j, SD += sum over values of S D, with S before the chunk and D
// after it, then D = W D + sum_i R_i gy_i^T.
template <int N>
void gradient_pass(BackwardWork<N>& q, Range values, Span span, Ahead& ahead) {
    using Registers = Block<N, block_rows(gradient_vectors(N)), gradient_vectors(N)>;
    constexpr int kQuads = Registers::kRowsHigh / 4;
    for (int l = 0; l < N; l += Registers::kLanesWide)
        for (int row = values.begin; row < values.end; row += Registers::kRowsHigh) {
            ahead.fetch(1);
            Registers D;
            D.load_from(q.D + row * N + l);
            for (int m = span.end - 1; m >= span.begin; m--) {
                const int chunk = m * kChunk * N;
                Vec quads[kChunk][kQuads];
                UNROLL for (int j = 0; j < kChunk; j++) {
                    D.read_step(q.v + chunk + j * N + row, q.Q + chunk + j * N + l);
                    D.dot(q.K + chunk + j * N + l, quads[j]);
                }
                store_row_sums<N, kQuads * 4>(q.gv + chunk + row, quads, l == 0);
                D.multiply(q.history + m * kHistoryStride<N> + row * N + l, q.SD + m * N + l);
                D.decay_lanes(q.W + m * N + l);
                D.write(q.gy + chunk + row, q.R + chunk + l);
            }
            D.store_to(q.D + row * N + l);
        }
}

// ---- one head of one sequence ---------------------------------------------------------------------------------------

// Where a sequence's head lies in the tensors, and which of its value columns this task computes.
struct Task {
    int64_t length;      // steps
    int64_t stride;      // elements from one step to the next
    int64_t checkpoint;  // elements from one checkpoint of this head to the next
    int n;               // head size
    Range values;        // columns, of the padded head size
};

template <int N>
struct ForwardWork {
    Rows<N, kSpan> v, R, K, y;
    alignas(64) float W[kSpan / kChunk * N], A[kSpan / kChunk * kPairs], u[N], S[N * N];
    alignas(64) float padded[4][kChunk * N];
};

// One step: reads the state once and writes it once.
template <int N, class Element>
void single_step(ForwardWork<N>& q, const Task& task, const Element* r, const Element* k, const Element* v,
                 const Element* w, const float* u, const float* state, Element* y, float* final_state) {
    const int n = task.n;
    float *decay = q.padded[3];
    pad_rows<N>(q.padded[0], r, 0, 1, n);
    pad_rows<N>(q.padded[1], k, 0, 1, n);
    pad_rows<N>(q.padded[2], v, 0, 1, n);
    pad_rows<N>(decay, w, 0, 1, n);
    for (int c = 0; c < N; c += kLanes) store(decay + c, decays(load(decay + c)).d);
    const int begin = task.values.begin, end = task.values.end < n ? task.values.end : n;
    float* __restrict sum = q.y;
    const float* __restrict value = q.padded[2];
    for (int c = begin; c < end; c++) sum[c] = 0.0f;
    for (int i = 0; i < n; i++) {
        const float ri = q.padded[0][i], ki = q.padded[1][i], di = decay[i], bonus = u[i] * ki;
        float* __restrict to = final_state + i * n;
        if (state) {
            const float* __restrict from = state + i * n;
            for (int c = begin; c < end; c++) {
                sum[c] += ri * (from[c] + bonus * value[c]);
                to[c] = di * from[c] + ki * value[c];
            }
        } else {
            for (int c = begin; c < end; c++) {
                sum[c] += ri * (bonus * value[c]);
                to[c] = ki * value[c];
            }
        }
    }
    store_rows<N>(y, q.y, 0, 1, {begin, end});
}

template <int N>
void forward_states(ForwardWork<N>& q, Range values, int chunks, Ahead& ahead) {
    constexpr int kWide = block_vectors(N), kNarrow = block_vectors(kSmallestValueBlock);
    if (values.end - values.begin >= kWide * kLanes)
        forward_pass<N, kWide>(q.S, values, q.R, q.K, q.W, q.v, q.y, chunks, ahead);
    else
        forward_pass<N, kNarrow>(q.S, values, q.R, q.K, q.W, q.v, q.y, chunks, ahead);
}

// Chunk m of a span from rows of N elements: v in floats, what the pass needs, and y as far as it stays in the chunk.
template <int N, class Element>
INLINE void start_chunk(ForwardWork<N>& q, Range values, int m, const Element* r, const Element* k, const Element* v,
                        const Element* w, int64_t stride) {
    const int chunk = m * kChunk * N;
    float* A = q.A + m * kPairs;
    prepare<N, false>(r, k, w, stride, q.u, {q.R + chunk, q.K + chunk, q.W + m * N, A, nullptr, nullptr});
    for (int c = values.begin; c < values.end; c += kLanes) {
        Vec value[kChunk];
        UNROLL for (int j = 0; j < kChunk; j++) {
            value[j] = load(v + j * stride + c);
            store(q.v + chunk + j * N + c, value[j]);
        }
        UNROLL for (int i = 0; i < kChunk; i++) {
            Vec sum = broadcast(A[i]) * value[0];
            UNROLL for (int j = 1; j <= i; j++) sum += broadcast(A[j * kChunk + i]) * value[j];
            store(q.y + chunk + i * N + c, sum);
        }
    }
}

// checkpoints: the first tile starts from `state`, the second's start goes to checkpoints[0], and so on; may be null.
template <int N, class Element>
void forward_head(ForwardWork<N>& q, const Task& task, const Element* r, const Element* k, const Element* v,
                  const Element* w, const float* u, const float* state, Element* y, float* final_state,
                  float* checkpoints) {
    if (task.length == 1) return single_step<N>(q, task, r, k, v, w, u, state, y, final_state);
    const int n = task.n;
    const int64_t stride = task.stride;
    const Range columns{task.values.begin, task.values.end < n ? task.values.end : n};
    for (int c = 0; c < N; c++) q.u[c] = c < n ? u[c] : 0.0f;
    load_state<N>(q.S, state, n);
    for (int64_t start = 0; start < task.length; start += kSpan) {
        const int steps = task.length - start < kSpan ? task.length - start : kSpan;
        const int chunks = (steps + kChunk - 1) / kChunk;
        if (checkpoints && start && start % kTile == 0)
            store_state<N>(checkpoints + (start / kTile - 1) * task.checkpoint, q.S, n, task.values);
        for (int m = 0; m < chunks; m++) {
            const int left = steps - m * kChunk;
            const int64_t offset = (start + m * kChunk) * stride;
            if (left >= kChunk && n == N) {
                start_chunk<N>(q, task.values, m, r + offset, k + offset, v + offset, w + offset, stride);
                continue;
            }
            pad_rows<N>(q.padded[0], r + offset, stride, left, n);
            pad_rows<N>(q.padded[1], k + offset, stride, left, n);
            pad_rows<N>(q.padded[2], v + offset, stride, left, n);
            pad_rows<N>(q.padded[3], w + offset, stride, left, n, kNoDecay);
            start_chunk<N, float>(q, task.values, m, q.padded[0], q.padded[1], q.padded[2], q.padded[3], N);
        }
        const int64_t next = (start + kSpan) * stride, after = task.length - start - kSpan;
        Ahead ahead;
        for (const Element* rows : {r, k, v, w}) ahead.add(rows + next, stride, after, n);
        ahead.add(y + start * stride, stride, steps, n);
        forward_states<N>(q, task.values, chunks, ahead);
        store_rows<N>(y + start * stride, q.y, stride, steps, columns);
    }
    store_state<N>(final_state, q.S, n, task.values);
}

// The gradients that a task of backward writes: r's, k's and w's as Gradient, v's as Element.
template <class Element, class Gradient>
struct Gradients {
    Gradient *r, *k, *w;
    int64_t stride;  // elements from one step of r, k, w to the next
    Element* v;
    float *u, *state;
};

// Chunk m of a tile from rows of N elements: all in floats, and what the passes need. gy may be null.
template <int N, class Element>
INLINE void start_chunk(BackwardWork<N>& q, int m, const Element* r, const Element* k, const Element* v,
                        const Element* w, const Element* gy, int64_t stride) {
    const int chunk = m * kChunk * N;
    prepare<N, true>(r, k, w, stride, q.u,
                     {q.R + chunk, q.K + chunk, q.W + m * N, q.A + m * kPairs, q.d + chunk, q.e + chunk});
    copy_rows<N>(q.r + chunk, r, stride);
    copy_rows<N>(q.k + chunk, k, stride);
    copy_rows<N>(q.v + chunk, v, stride);
    copy_rows<N>(q.gy + chunk, gy, stride);
}

// The gradients inside chunk m, given P and Q of the passes: r's and k's replace P and Q, w's replaces e; v's is
// completed in place; gu advances.
template <int N>
void finish_chunk(BackwardWork<N>& q, Range values, int m) {
    const int chunk = m * kChunk * N;
    const float *gy = q.gy + chunk, *v = q.v + chunk, *A = q.A + m * kPairs;
    float* gv = q.gv + chunk;
    alignas(64) float G[kPairs];  // A's gradient: G_ij = <gy_i, v_j>, laid out like A

    Vec g[kChunk][kChunk];
    UNROLL for (int i = 0; i < kChunk; i++) UNROLL for (int j = 0; j <= i; j++) g[i][j] = zero();
    for (int c = values.begin; c < values.end; c += kLanes) {
        Vec value[kChunk], gradient[kChunk];
        UNROLL for (int i = 0; i < kChunk; i++) {
            value[i] = load(v + i * N + c);
            gradient[i] = load(gy + i * N + c);
        }
        UNROLL for (int i = 0; i < kChunk; i++) UNROLL for (int j = 0; j <= i; j++) g[i][j] += gradient[i] * value[j];
        UNROLL for (int j = 0; j < kChunk; j++) {
            Vec sum = load(gv + j * N + c);
            UNROLL for (int i = j; i < kChunk; i++) sum += broadcast(A[j * kChunk + i]) * gradient[i];
            store(gv + j * N + c, sum);
        }
    }
    store_pairs(G, g);
    const Vec g10 = broadcast(G[1]), g20 = broadcast(G[2]), g30 = broadcast(G[3]);
    const Vec g21 = broadcast(G[kChunk + 2]), g31 = broadcast(G[kChunk + 3]), g32 = broadcast(G[2 * kChunk + 3]);

    for (int c = 0; c < N; c += kLanes) {
        const float *r = q.r + chunk + c, *k = q.k + chunk + c, *d = q.d + chunk + c;
        float *P = q.P + chunk + c, *Q = q.Q + chunk + c, *e = q.e + chunk + c;
        const Vec d0 = load(d), d1 = load(d + N), d2 = load(d + 2 * N), d3 = load(d + 3 * N);
        const Vec d01 = d0 * d1, d23 = d2 * d3;
        const Vec k0 = load(k), k1 = load(k + N), k2 = load(k + 2 * N);
        const Vec r1 = load(r + N), r2 = load(r + 2 * N), r3 = load(r + 3 * N);

        // Through the state: the parts of r's and k's gradients.
        Vec gr[kChunk] = {load(P), load(P + N) * d0, load(P + 2 * N) * d01, load(P + 3 * N) * (d01 * d2)};
        Vec gk[kChunk] = {load(Q) * (d1 * d23), load(Q + N) * d23, load(Q + 2 * N) * d3, load(Q + 3 * N)};

        // dL / d log d, by where the read is (after the chunk or in it) and where the write (before it or in it).
        const Vec read3 = r3 * gr[3], read23 = r2 * gr[2] + read3, read123 = r1 * gr[1] + read23;
        const Vec write0 = k0 * gk[0], write01 = k1 * gk[1] + write0, write012 = k2 * gk[2] + write01;
        const Vec through = load(q.W + m * N + c) * load(q.SD + m * N + c);
        Vec gd[kChunk] = {through + read123, through + write0 + read23, through + write01 + read3, through + write012};

        // Between the steps of the chunk.
        const Vec z20 = g20 * d1, z31 = g31 * d2, z30 = g30 * (d1 * d2);
        const Vec r2_z20 = r2 * z20, r3_z31 = r3 * z31, r3_z30 = r3 * z30;
        gr[1] += g10 * k0;
        gr[2] += g21 * k1 + z20 * k0;
        gr[3] += g32 * k2 + z31 * k1 + z30 * k0;
        gk[0] += g10 * r1 + r2_z20 + r3_z30;
        gk[1] += g21 * r2 + r3_z31;
        gk[2] += g32 * r3;
        const Vec across_both = r3_z30 * k0;  // written at 0, read at 3: decayed by steps 1 and 2
        gd[1] += r2_z20 * k0 + across_both;
        gd[2] += r3_z31 * k1 + across_both;

        // The bonus u, and out.
        const Vec bonus = load(q.u + c);
        Vec gu = load(q.gu + c);
        UNROLL for (int i = 0; i < kChunk; i++) {
            const Vec own = broadcast(G[i * kChunk + i]), ri = load(r + i * N), ki = load(k + i * N);
            const Vec own_bonus = own * bonus;
            gu += (own * ri) * ki;
            store(P + i * N, gr[i] + own_bonus * ki);
            store(Q + i * N, gk[i] + own_bonus * ri);
            store(e + i * N, -gd[i] * load(e + i * N));
        }
        store(q.gu + c, gu);
    }
}

template <int N, class Element, class Gradient>
void backward_head(BackwardWork<N>& q, const Task& task, const Element* r, const Element* k, const Element* v,
                   const Element* w, const float* u, const float* state, const float* checkpoints, const Element* gy,
                   const float* gfinal, const Gradients<Element, Gradient>& to) {
    const int n = task.n;
    const int64_t stride = task.stride;
    const Range values = task.values, key_columns{0, n};
    const Range value_columns{values.begin, values.end < n ? values.end : n};
    for (int c = 0; c < N; c++) q.u[c] = c < n ? u[c] : 0.0f;
    memset(q.gu, 0, sizeof q.gu);
    load_transposed_state<N>(q.D, gfinal, n);
    for (int64_t start = (task.length - 1) / kTile * kTile; start >= 0; start -= kTile) {
        const int steps = task.length - start < kTile ? task.length - start : kTile;
        const int chunks = (steps + kChunk - 1) / kChunk;
        load_transposed_state<N>(q.S, start ? checkpoints + (start / kTile - 1) * task.checkpoint : state, n);
        Ahead outputs;
        for (Gradient* rows : {to.r, to.k, to.w}) outputs.add(rows + start * to.stride, to.stride, steps, n);
        outputs.add(to.v + start * stride, stride, steps, n);
        for (int begin = 0; begin < chunks; begin += kSpanChunks) {
            const Span span{begin, chunks < begin + kSpanChunks ? chunks : begin + kSpanChunks};
            for (int m = span.begin; m < span.end; m++) {
                const int left = steps - m * kChunk;
                const int64_t offset = (start + m * kChunk) * stride;
                const Element* chunk_gy = gy ? gy + offset : gy;
                if (left >= kChunk && n == N) {
                    start_chunk<N>(q, m, r + offset, k + offset, v + offset, w + offset, chunk_gy, stride);
                    continue;
                }
                float* padded_gy = q.Q;  // not in use yet
                pad_rows<N>(q.padded[0], r + offset, stride, left, n);
                pad_rows<N>(q.padded[1], k + offset, stride, left, n);
                pad_rows<N>(q.padded[2], v + offset, stride, left, n);
                pad_rows<N>(q.padded[3], w + offset, stride, left, n, kNoDecay);
                if (gy) pad_rows<N>(padded_gy, chunk_gy, stride, left, n);
                start_chunk<N, float>(q, m, q.padded[0], q.padded[1], q.padded[2], q.padded[3], gy ? padded_gy : nullptr, N);
            }
            memset(q.P + span.begin * kChunk * N, 0, sizeof(float) * (span.end - span.begin) * kChunk * N);
            state_pass<N>(q, values, span, outputs);
        }
        const int64_t previous = (start - kTile) * stride;
        Ahead inputs;
        if (start) {
            for (const Element* rows : {r, k, v, w}) inputs.add(rows + previous, stride, kTile, n);
            if (gy) inputs.add(gy + previous, stride, kTile, n);
            inputs.add(start > kTile ? checkpoints + (start / kTile - 2) * task.checkpoint : state, n, n, n);
        }
        for (int begin = (chunks - 1) / kSpanChunks * kSpanChunks; begin >= 0; begin -= kSpanChunks) {
            const Span span{begin, chunks < begin + kSpanChunks ? chunks : begin + kSpanChunks};
            memset(q.Q + span.begin * kChunk * N, 0, sizeof(float) * (span.end - span.begin) * kChunk * N);
            memset(q.SD + span.begin * N, 0, sizeof(float) * (span.end - span.begin) * N);
            gradient_pass<N>(q, values, span, inputs);
            for (int m = span.end - 1; m >= span.begin; m--) finish_chunk<N>(q, values, m);
            const int row = span.begin * kChunk;
            const int64_t first = start + row;
            const int present = steps - row < kSpan ? steps - row : kSpan;
            store_rows<N>(to.r + first * to.stride, q.P + row * N, to.stride, present, key_columns);
            store_rows<N>(to.k + first * to.stride, q.Q + row * N, to.stride, present, key_columns);
            store_rows<N>(to.w + first * to.stride, q.e + row * N, to.stride, present, key_columns);
            store_rows<N>(to.v + first * stride, q.gv + row * N, stride, present, value_columns);
        }
    }
    for (int c = 0; c < n; c++) to.u[c] = q.gu[c];
    for (int i = 0; i < n; i++)
        for (int c = value_columns.begin; c < value_columns.end; c++) to.state[i * n + c] = q.D[c * N + i];
}

// ---- all heads of all sequences -------------------------------------------------------------------------------------

// Denormal numbers, which strong decays make many of, cost a hundred times a multiplication: count them as 0 meanwhile.
class FlushDenormals {
#if defined(__x86_64__)
  public:
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#elif defined(__aarch64__)
  public:
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t{1} << 24)));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

  private:
    uint64_t before_;
#endif
};

// Memory that a thread keeps from call to call: fresh pages cost as much as a short sequence.
class Workspace {
  public:
    ~Workspace() { free(memory_); }
    void* get(size_t size) {
        if (size > size_) {
            free(memory_);
            memory_ = aligned_alloc(64, (size + 63) / 64 * 64);
            size_ = memory_ ? size : 0;
        }
        return memory_;
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

template <class Work>
Work* thread_work() {
    static thread_local Workspace workspace;
    return static_cast<Work*>(workspace.get(sizeof(Work)));
}

// The tasks of a call: sequence by sequence, head by head, block of values by block of values.
struct Plan {
    int64_t tasks;
    int threads, blocks, block;
};

Plan plan(const Arguments& a, int padded) {
    const int64_t heads = a.sequences * a.heads;
    const int64_t work = a.tokens * a.heads * a.head_size * a.head_size;
    Plan p{heads, work < kWorkForThreads ? 1 : a.threads, 1, padded};
    while (p.tasks < p.threads && p.block >= 2 * kSmallestValueBlock) p.tasks *= 2, p.blocks *= 2, p.block /= 2;
    return p;
}

// A task's place: `first` elements into r (and its like), state number `index`, checkpoint number `saved`.
struct Place {
    Task task;
    int64_t sequence, head, first, token, index, saved;
    int block;
};

Place place(const Arguments& a, const Plan& p, int64_t number) {
    Place at;
    at.block = number % p.blocks;
    at.head = number / p.blocks % a.heads;
    at.sequence = number / p.blocks / a.heads;
    const int64_t even = a.tokens / a.sequences;
    const int64_t begin = a.cu_seqlens ? a.cu_seqlens[at.sequence] : at.sequence * even;
    const int64_t end = a.cu_seqlens ? a.cu_seqlens[at.sequence + 1] : begin + even;
    const int64_t size = a.head_size * a.head_size;
    at.token = begin;
    at.first = (begin * a.heads + at.head) * a.head_size;
    at.index = (at.sequence * a.heads + at.head) * size;
    // A sequence saves one state less than it has tiles, so that counting from begin / kTile never overlaps.
    at.saved = (begin / kTile * a.heads + at.head) * size;
    at.task.length = end - begin;
    at.task.stride = a.heads * a.head_size;
    at.task.checkpoint = a.heads * size;
    at.task.n = static_cast<int>(a.head_size);
    at.task.values = {at.block * p.block, (at.block + 1) * p.block};
    return at;
}

template <class T>
INLINE T* offset(const void* base, int64_t elements) {
    return base ? static_cast<T*>(const_cast<void*>(base)) + elements : nullptr;
}

template <int N, class Element>
bool forward_all(const Arguments& a) {
    const Plan p = plan(a, N);
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
        const Gradients<Element, Gradient> to{gr + gradient, gk + gradient, gw + gradient, at.task.stride,
                                              offset<Element>(a.gv, at.first), gu + number * a.head_size,
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
    const Plan p = plan(a, N);
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

template <class Element>
bool forward_of(const Arguments& a) {
    if (a.head_size <= 16) return forward_all<16, Element>(a);
    if (a.head_size <= 32) return forward_all<32, Element>(a);
    if (a.head_size <= 64) return forward_all<64, Element>(a);
    return forward_all<128, Element>(a);
}

template <class Element>
bool backward_of(const Arguments& a) {
    if (a.head_size <= 16) return backward_all<16, Element>(a);
    if (a.head_size <= 32) return backward_all<32, Element>(a);
    if (a.head_size <= 64) return backward_all<64, Element>(a);
    return backward_all<128, Element>(a);
}

}  // namespace

bool forward(const Arguments& a) { return a.bfloat16 ? forward_of<Bfloat16>(a) : forward_of<float>(a); }
bool backward(const Arguments& a) { return a.bfloat16 ? backward_of<Bfloat16>(a) : backward_of<float>(a); }

}  // namespace WKV6_LEVEL
}  // namespace wkv6
