// Time split into groups of tokens, which different blocks walk at once, because a block for each of few heads leaves
// most of a GPU idle. A group turns the state S before it into
//     S_end = diag(transition) S + local
// with transition the product of its tokens' decays, and local its result for a state of zeros. So one pass over all
// groups at once, which computes only states, finds both; a scan finds the states that the groups start with; and then
// each is like a sequence of its own. Backward is the same from the end, with dS the gradient of the state after a
// group:
//     dS_start = diag(transition) dS + local
#pragma once
#include "wkv6/chunk.cuh"

struct GroupShared {
    struct { Shape::Rows x, y, w; } chunk[2];  // one in use, one arriving
    Shape::Rows scaled;
    Products products;
};

// A group's transition and local state: sums of outer products of x (k end, or backward r start) and y (v, or gy). Warp
// i owns rows k = 16 i .. of the sum.
template <bool BACKWARD>
__device__ __forceinline__ void chunked_groups(const Arguments& a) {
    constexpr int tiles = Shape::tiles, stride = Shape::stride;
    GroupShared& shared = *(GroupShared*)dynamic_shared();
    const Sequence s(a);
    if (s.length < 0) return;
    const int c0 = threadIdx.x / 32 * 16;  // the warp's rows
    const int chunks = (s.length + CHUNK - 1) / CHUNK;

    // Of the chunk that is number i in the order of the walk.
    const auto start = [&](int i) { return (BACKWARD ? chunks - 1 - i : i) * CHUNK; };
    const auto start_fetch = [&](int i) {
        if (i == chunks) return;
        auto& next = shared.chunk[i % 2];
        fetch(next.x, BACKWARD ? a.r : a.k, s, start(i));
        fetch(next.y, BACKWARD ? a.gy : a.v, s, start(i));
        fetch(next.w, a.w, s, start(i));
    };

    Accumulator S[tiles];
    #pragma unroll
    for (int b = 0; b < tiles; b++) S[b] = zeros();
    Pair transition = {{1.f, 1.f}};  // of the channels of the thread's Decays
    start_fetch(0);
    for (int i = 0; i < chunks; i++) {
        const auto& in = shared.chunk[i % 2];
        cp_async_wait_all();
        __syncthreads();  // the chunk has arrived, and nobody reads the previous one or its operand any more
        start_fetch(i + 1);

        Decays decays(in.w, s.length - start(i), shared.products);
        __syncthreads();  // the quarters are known
        decays.halves(shared.products);
        Pair factor[4];
        BACKWARD ? decays.starts(factor) : decays.ends(factor);
        decays.scale(in.x, factor, shared.scaled);
        #pragma unroll
        for (int j = 0; j < 2; j++) transition.x[j] *= decays.first.x[j] * decays.second.x[j];
        __syncthreads();  // the operand is complete

        const Tile x = load_transposed(&shared.scaled[0][c0], stride);  // (k, t)
        #pragma unroll
        for (int b = 0; b < tiles; b++) {
            scale_rows(S[b], &shared.products.whole[c0]);
            multiply(S[b], x, load_right_transposed(&in.y[0][b * 16], stride));
        }
    }
    store_state(a.parts + s.state, S, c0, false);
    if (!BACKWARD && threadIdx.x < N / 2) *(Pair*)&a.transitions[s.channels + threadIdx.x * 2] = transition;
}

struct alignas(16) Quad { float x[4]; };

constexpr int SCAN_THREADS = 128;

// Replaces the groups' local states by those that they start with, and gives the final state; in backward, by the
// gradients of the states that they end with, and gives that of the initial state. A thread takes four neighbours of a
// row.
template <bool BACKWARD>
__device__ __forceinline__ void scan_groups(const Arguments& a) {
    const int N = a.head_size, blocks = N * N / (4 * SCAN_THREADS);  // of a head
    const int head = blockIdx.x / blocks, h = head % a.heads, n = head / a.heads;
    const int here = (blockIdx.x % blocks * SCAN_THREADS + threadIdx.x) * 4, row = here / N;
    const int groups = max(1, (Sequence::whole_length(a, n) + a.group - 1) / a.group);
    const int first = Sequence::first_group(a, n) + (BACKWARD ? groups - 1 : 0);
    const index_t of_state = (index_t)N * N;

    // The head in the group that is number i in the order of the scan.
    const auto group = [&](int i) { return (index_t)(BACKWARD ? first - i : first + i) * a.heads + h; };
    const auto part = [&](int i) -> Quad& { return *(Quad*)&a.parts[group(i) * of_state + here]; };
    const float* start = BACKWARD ? a.gfinal : a.state;
    Quad S = start ? *(const Quad*)&start[head * of_state + here] : Quad{{0.f, 0.f, 0.f, 0.f}};
    Quad arriving = part(0);
    for (int i = 0; i < groups; i++) {
        const Quad local = arriving;
        if (i + 1 < groups) arriving = part(i + 1);
        const float transition = a.transitions[group(i) * N + row];
        part(i) = S;
        #pragma unroll
        for (int j = 0; j < 4; j++) S.x[j] = transition * S.x[j] + local.x[j];
    }
    float* end = BACKWARD ? a.gstate : a.final_state;
    if (end) *(Quad*)&end[head * of_state + here] = S;
}
