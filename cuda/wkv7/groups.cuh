// Time split into groups of tokens, which different blocks walk at once, because a block for each of few heads leaves
// most of a GPU idle. A group's effect on the state S before it is linear,
//     S_end = S transition + local
// with transition the product of its tokens' diag(d) + a bᵀ, and local its result for a state of zeros. So one pass
// over all groups at once, which computes only states, finds both, transition by starting from the identity without
// writes; a scan finds the states that the groups start with; and then each is like a sequence of its own. Backward is
// the same from the end, with dS the gradient of the state after a group:
//     dS_start = dS transitionᵀ + local
// The passes keep states in float32, as all kernels do, and the scan multiplies in float32.
#pragma once
#include "wkv7/chunk.cuh"

struct GroupShared {
    struct {
        Shape::Rows r, w, x;  // r only in backward
        Keys keys;
    } chunk[2];  // one in use, one arriving
    struct Made {
        Operands operands;
        PairMatrices pairs;
    } made[2];  // one in use, one in the making
};

// A group's local state, and in forward its transition, which backward takes from forward. The state's inputs are v,
// through k, or in backward gy, through r. Half of the warps are makers, as in chunked_forward.
template <bool BACKWARD>
__device__ __forceinline__ void chunked_groups(const Arguments& a) {
    constexpr int tiles = Shape::tiles, stride = Shape::stride, states = BACKWARD ? 1 : 2;
    constexpr PairName driven = BACKWARD ? R_B : A_K;
    GroupShared& shared = *(GroupShared*)dynamic_shared();
    const Sequence s(a);
    if (s.length < 0) return;
    const int warp = threadIdx.x / 32;
    const bool maker = warp < tiles;
    const int v0 = warp % tiles * 16;  // the rows of a warp that is no maker

    // The makers' steps, for the chunk that is number i in the order of the walk.
    const auto start = [&](int i) { return (BACKWARD ? (s.length - 1) / CHUNK - i : i) * CHUNK; };
    const auto is_past = [&](int i) { return i * CHUNK >= s.length; };
    const auto start_fetch = [&](int i) {
        if (is_past(i)) return;
        auto& next = shared.chunk[i % 2];
        if (BACKWARD) fetch(next.r, a.r, s, start(i));
        fetch(next.w, a.w, s, start(i));
        fetch(next.x, BACKWARD ? a.gy : a.v, s, start(i));
        next.keys.template start_fetch<!BACKWARD>(a, s, start(i));
    };
    const auto make_operands = [&](int i) {
        if (is_past(i)) return;
        const auto& in = shared.chunk[i % 2];
        Operands& o = shared.made[i % 2].operands;
        const Decays decays(in.w, s.length - start(i), o);
        const auto share = [&](const Shape::Rows& rows) { return load_four(rows, decays.t, decays.c); };
        decays.template reads<BACKWARD>(share(in.r), share(in.keys.a), o);
        decays.template writes<!BACKWARD>(share(in.keys.k), share(in.keys.b), o);
    };
    const auto make_pairs_and_fetch = [&](int i) {
        if (is_past(i)) return;
        auto& made = shared.made[i % 2];
        start_fetch(i + 1);
        if (warp == 0) make_pairs(A_B, made.pairs, made.operands);
        if (warp == 1) make_pairs(driven, made.pairs, made.operands);
        cp_async_wait_all();
    };

    Accumulator S[states][tiles];  // local, transition
    const int lane = lane_id();
    #pragma unroll
    for (int b = 0; b < tiles; b++)
        #pragma unroll
        for (int e = 0; e < 8; e++) {
            S[0][b].c[e] = 0.f;
            if (!BACKWARD) S[states - 1][b].c[e] = v0 + tile_row(lane, e) == b * 16 + tile_column(lane, e) ? 1.f : 0.f;
        }
    begin_walk(maker, start_fetch, make_operands, make_pairs_and_fetch);
    for (int i = 0; !is_past(i); i++) {
        const auto& made = shared.made[i % 2];
        const Operands& o = made.operands;
        const auto& reads = BACKWARD ? o.b : o.a;
        const auto& writes = BACKWARD ? o.a : o.b;
        const auto& driver = BACKWARD ? o.r : o.k;
        Accumulator read[states];  // the chunk's tokens' reads, (v, t)
        __syncthreads();  // this chunk's pairs are complete, the next has arrived, and nobody reads the previous one
        if (maker) {
            make_operands(i + 1);
        } else {
            const Tile x = load_transposed(&shared.chunk[i % 2].x[0][v0], stride);  // (v, t)
            const bf16* pair = &made.pairs.of[driven][0][0];
            #pragma unroll
            for (int j = 0; j < states; j++) read[j] = zeros();
            multiply(read[0], x, BACKWARD ? load_transposed(pair, CHUNK + 8) : load_tile(pair, CHUNK + 8));
            #pragma unroll
            for (int b = 0; b < tiles; b++) {
                const Tile operand = load_tile(&reads[0][b * 16], stride);
                #pragma unroll
                for (int j = 0; j < states; j++) {
                    if (BACKWARD) scale_columns(S[j][b], &o.whole[b * 16]);
                    multiply(read[j], rounded(S[j][b]), operand);
                }
                multiply(S[0][b], x, load_transposed(&driver[0][b * 16], stride));
            }
        }
        __syncthreads();  // the next chunk's operands are complete, and this one's tokens are read
        if (maker) {
            make_pairs_and_fetch(i + 1);
        } else {
            #pragma unroll
            for (int j = 0; j < states; j++) {
                const Tile solved = rounded(BACKWARD ? solve_turned(read[j], made.pairs) : solve(read[j], made.pairs));
                #pragma unroll
                for (int b = 0; b < tiles; b++) {
                    multiply(S[j][b], solved, load_transposed(&writes[0][b * 16], stride));
                    if (!BACKWARD) scale_columns(S[j][b], &o.whole[b * 16]);
                }
            }
        }
    }
    if (maker) return;
    store_state(a.parts + s.state, S[0], v0, false);
    if (!BACKWARD) store_state(a.transitions + s.state, S[states - 1], v0, false);
}

struct ScanShared {
    float S[16][N];
    float transition[N][N + 1];  // padded, as it is read by rows or by columns
};

// Replaces the groups' local states by those that they start with, and gives the final state; in backward, by the
// gradients of the states that they end with, and gives that of the initial state. A block takes 16 rows of a
// sequence's head, because no row of a state depends on another.
template <bool BACKWARD>
__device__ __forceinline__ void scan_groups(const Arguments& a) {
    constexpr int rows = 4, columns = N / 32;  // of a thread
    ScanShared& shared = *(ScanShared*)dynamic_shared();
    const int head = blockIdx.x / (N / 16), h = head % a.heads, n = head / a.heads;
    const int row = threadIdx.x / 32 * rows, column = threadIdx.x % 32;
    const index_t of_head = (index_t)N * N, here = (blockIdx.x % (N / 16) * 16 + row) * N + column;
    const int groups = max(1, (Sequence::whole_length(a, n) + a.group - 1) / a.group);
    const int first = Sequence::first_group(a, n);

    float S[rows][columns];
    const float* start = BACKWARD ? a.gfinal : a.state;
    #pragma unroll
    for (int i = 0; i < rows; i++)
        #pragma unroll
        for (int j = 0; j < columns; j++) S[i][j] = start ? start[head * of_head + here + i * N + j * 32] : 0.f;

    for (int turn = 0; turn < groups; turn++) {
        const index_t group = ((index_t)(first + (BACKWARD ? groups - 1 - turn : turn)) * a.heads + h) * of_head;
        float next[rows][columns];
        #pragma unroll
        for (int i = 0; i < rows; i++)
            #pragma unroll
            for (int j = 0; j < columns; j++) {
                float& part = a.parts[group + here + i * N + j * 32];
                next[i][j] = part;
                part = S[i][j];
            }
        __syncthreads();  // nobody reads the previous group any more
        #pragma unroll
        for (int i = 0; i < rows; i++)
            #pragma unroll
            for (int j = 0; j < columns; j++) shared.S[row + i][column + j * 32] = S[i][j];
        #pragma unroll
        for (int done = 0; done < N * N; done += 128) {
            const int i = done + threadIdx.x;
            shared.transition[i / N][i % N] = a.transitions[group + i];
        }
        __syncthreads();  // the state and the transition are there
        #pragma unroll 8
        for (int k = 0; k < N; k++)
            #pragma unroll
            for (int j = 0; j < columns; j++) {
                const int c = column + j * 32;
                const float factor = BACKWARD ? shared.transition[c][k] : shared.transition[k][c];
                #pragma unroll
                for (int i = 0; i < rows; i++) next[i][j] += shared.S[row + i][k] * factor;
            }
        #pragma unroll
        for (int i = 0; i < rows; i++)
            #pragma unroll
            for (int j = 0; j < columns; j++) S[i][j] = next[i][j];
    }
    float* end = BACKWARD ? a.gstate : a.final_state;
    if (!end) return;
    #pragma unroll
    for (int i = 0; i < rows; i++)
        #pragma unroll
        for (int j = 0; j < columns; j++) end[head * of_head + here + i * N + j * 32] = S[i][j];
}
