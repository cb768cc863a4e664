// What comes before the recurrence in RWKV-6's block, for the kernels that make it where they use it: the decay, a
// parameter and a product of low rank R. For the tokens of a head,
//     w = decay + low up,    low (tokens, R), up (R, N)
// in float32, rounded once. A warp makes 16 channels of a chunk, of which it has up in registers: a lane of row g and
// column q, as common/tile.cuh has them, four neighbours from channel 2 q, of tokens g and g + 8. Forward and backward
// add up in the same order, and so have the same bits.
#pragma once
#include "common/fetch.cuh"
#include "common/vector.cuh"
#include "wkv6/chunk.cuh"

// The decay's share of forward's shared memory: low of two chunks, of the next one and of that after it.
template <int R>
struct DecayShared {
    typename Shape<R>::Rows low[2];
};
template <>
struct DecayShared<0> {};

// Low of a segment, for backward.
template <int R>
using LowRows = typename Shape<R>::Rows[CHUNKS];

// A warp's 16 channels of up and of the parameter.
template <int N, int R>
struct DecayFactors {
    Right up[R / 16];  // the two halves of its columns are neighbouring channels
    uint32_t decay[2];

    // The head's channels from c0.
    __device__ __forceinline__ DecayFactors(const Arguments& a, const Sequence& s, int c0) {
        const int lane = lane_id(), c = s.channel(a) + c0;
        // In 32 bits, so that an address takes one instruction.
        const uint32_t stride = a.heads * N, own = c + lane / 4 * 2 + lane % 4 * 2 * stride;
        #pragma unroll
        for (int i = 0; i < R / 16; i++)
            #pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t row = own + (i * 16 + j * 8) * stride;
                const uint32_t upper = *(const uint32_t*)((const bf16*)a.up + row);
                const uint32_t lower = *(const uint32_t*)((const bf16*)a.up + row + stride);
                up[i].x[j] = (upper & 0xffffu) | lower << 16;
                up[i].x[j + 2] = upper >> 16 | (lower & 0xffff0000u);
            }
        #pragma unroll
        for (int j = 0; j < 2; j++) decay[j] = *(const uint32_t*)((const bf16*)a.decay + c + lane % 4 * 4 + j * 2);
    }

    // Step `b` of the N / 16 that add up to a chunk's product.
    __device__ __forceinline__ void step(Accumulator& product, const typename Shape<R>::Rows& low, int b) const {
        #pragma unroll
        for (int i = b; i < R / 16; i += N / 16) multiply(product, load_tile(&low[0][i * 16], Shape<R>::stride), up[i]);
    }

    // Writes w, of the whole product, to p, the warp's first channel, in rows that lie `stride` apart.
    __device__ __forceinline__ void put(bf16* p, int stride, const Accumulator& product) const {
        using Four = Vector<uint32_t, 2>;
        const int lane = lane_id();
        Accumulator w = product;
        #pragma unroll
        for (int e = 0; e < 8; e++) w.c[e] += e & 4 ? high_half(decay[e & 1]) : low_half(decay[e & 1]);
        #pragma unroll
        for (int e = 0; e < 4; e += 2)
            *(Four*)(p + (lane / 4 + e * 4) * stride + lane % 4 * 4) =
                Four{{pack_bf16(w.c[e], w.c[e + 4]), pack_bf16(w.c[e + 1], w.c[e + 5])}};
    }
};
template <int N>
struct DecayFactors<N, 0> {
    __device__ __forceinline__ DecayFactors(const Arguments&, const Sequence&, int) {}
};

// Makes w of the segment that begins at token `begin`, a warp the head's 16 channels from c0: all of it into `all`, in
// rows of N, and that of its first chunk into `first` as well. `low` may be in use before the call; what is made is
// there for other warps after the next barrier.
template <int N, int R>
__device__ __forceinline__ void make_decay(const Arguments& a, const Sequence& s, int begin, int c0, LowRows<R>& low,
                                           bf16* all, typename Shape<N>::Rows& first) {
    __syncthreads();  // nobody reads what is in low's place
    fetch_rows<R>(low[0], (const bf16*)a.low + (s.token + begin) * R, R, SEGMENT, s.length - begin);
    const DecayFactors<N, R> factors(a, s, c0);
    cp_async_wait_all();
    __syncthreads();  // low has arrived
    #pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        Accumulator product = zeros();
        #pragma unroll
        for (int b = 0; b < Shape<N>::tiles; b++) factors.step(product, low[i], b);
        if (i == 0) factors.put(&first[0][c0], Shape<N>::stride, product);
        factors.put(all + i * CHUNK * N + c0, N, product);
    }
}
