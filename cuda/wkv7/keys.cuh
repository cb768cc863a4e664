// The keys of a token, k, a and b, for the chunked kernels: given, or made as in delta_keys of ops/mix/op.py from a k
// and from `low`, the input of an in-context learning rate. With n the direction of k k_k in a head, and
// rate = sigmoid(a0 + low), they are k (1 + (rate - 1) k_a), -n and n rate. If they are made, each token also has a
// bonus: the sum of r k r_k over its head, which a norm after the recurrence adds to y.
#pragma once
#include "common/chunk.cuh"
#include "wkv7/arguments.cuh"

// A thread's share of a chunk's tensor: two neighbouring channels of four tokens.
struct Four { Pair x[4]; };

__device__ __forceinline__ Four load_four(const Shape::Rows& rows, int t, int c) {
    Four four;
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t pair = *(const uint32_t*)&rows[t + i][c];
        four.x[i] = Pair{{low_half(pair), high_half(pair)}};
    }
    return four;
}

// The operands made of one chunk, all relative to its start: element (t, c) is that of token t times
//     r: the decays up to t    a: those before t    k, b: the reciprocal of those up to t
struct Operands {
    Shape::Rows r, a, k, b;
    float whole[N];  // the product of all decays
};

// A chunk's keys if they are given.
struct GivenKeys {
    struct Parameters {
        __device__ __forceinline__ void load(const Arguments&, const Sequence&) {}
    };
    Shape::Rows k, a, b;

    // Starts the copies; k may be spared.
    template <bool BACKWARD, bool WITH_K = true>
    __device__ __forceinline__ void start_fetch(const Arguments& from, const Sequence& s, int t0) {
        if (WITH_K) fetch(k, from.k, s, t0);
        fetch(a, from.a, s, t0);
        fetch(b, from.b, s, t0);
    }
    // There are no lengths to measure.
    __device__ __forceinline__ void start_measure(const Arguments&, const Sequence&, int, int) {}
    template <bool STORE>
    __device__ __forceinline__ void measure(const Arguments&, const Sequence&, const Parameters&, int, int) {}

    // Those of a thread: channels c and c + 1, four tokens from t.
    struct Share {
        Four k, a, b;
        __device__ __forceinline__ Share(const GivenKeys& keys, const Parameters&, int t, int c)
            : k(load_four(keys.k, t, c)), a(load_four(keys.a, t, c)), b(load_four(keys.b, t, c)) {}
    };

    struct Bonuses {  // there are no bonuses
        __device__ __forceinline__ void gather(const Operands&, const Parameters&, int) {}
        __device__ __forceinline__ void store(const Arguments&, const Sequence&, int, int) {}
    };
    __device__ __forceinline__ void add_bonus(const Parameters&, int, const Accumulator&, const Accumulator&,
                                              Accumulator&, Accumulator&) const {}

    __device__ __forceinline__ void keep_along(const Accumulator&) {}
    __device__ __forceinline__ void store_gradients(const Arguments& to, const Parameters&, int, index_t at,
                                                    index_t row, int valid, const Accumulator& gk,
                                                    const Accumulator& ga, const Accumulator& gb) const {
        store_tile((bf16*)to.gk + at, row, valid, transposed(rounded(gk)));
        store_tile((bf16*)to.ga + at, row, valid, transposed(rounded(ga)));
        store_tile((bf16*)to.gb + at, row, valid, transposed(rounded(gb)));
    }
};

// A direction is divided by its length, but at least by this.
constexpr float LEAST_LENGTH = 1e-12f;

// A chunk's keys if they are made.
struct MadeKeys {
    struct Parameters {  // the head's; shift is a0 as an exponent of 2
        float shift[N], k_k[N], k_a[N], r_k[N];

        __device__ __forceinline__ void load(const Arguments& a, const Sequence& s) {
            const int c = threadIdx.x;
            const auto element = [&](const void* tensor) { return to_float(((const bf16*)tensor)[s.channel(a) + c]); };
            if (c < N) {
                shift[c] = -LOG2_E * element(a.a0);
                k_k[c] = element(a.k_k);
                k_a[c] = element(a.k_a);
                r_k[c] = element(a.r_k);
            }
            __syncthreads();  // they are complete
        }
    };
    static __device__ __forceinline__ float rate_of(float shift, float low) {
        return reciprocal_approx(1.f + exp2_approx(shift - low * LOG2_E));
    }
    Shape::Rows k, low;
    float scale[CHUNK];                 // 1 / the length of k k_k
    float gbonus[CHUNK], along[CHUNK];  // backward

    // Starts the copies; in forward without k, which the threads that measure the lengths copy themselves.
    template <bool BACKWARD, bool WITH_K = true>
    __device__ __forceinline__ void start_fetch(const Arguments& from, const Sequence& s, int t0) {
        fetch(low, from.low, s, t0);
        if (!BACKWARD) return;
        fetch(k, from.k, s, t0);
        const int t = threadIdx.x;
        if (t >= CHUNK) return;
        const bool valid = t0 + t < s.length;
        const index_t at = valid ? number(from, s, t0 + t) : 0;
        cp_async_4(&scale[t], from.scales + at, valid);
        cp_async_4(&gbonus[t], from.gbonus ? from.gbonus + at : from.scales, from.gbonus && valid);
    }
    // The place of a token's head in a tensor (tokens, heads).
    static __device__ __forceinline__ index_t number(const Arguments& a, const Sequence& s, int t) {
        return s.elements / N + (index_t)t * a.heads;
    }

    // Forward: finds the lengths. A thread, one of 2 N, has copied eight channels of a token, and its neighbours the
    // others.
    __device__ __forceinline__ void start_measure(const Arguments& from, const Sequence& s, int t0, int thread) {
        fetch(k, from.k, s, t0, thread);
    }
    template <bool STORE>
    __device__ __forceinline__ void measure(const Arguments& a, const Sequence& s, const Parameters& p, int t0,
                                            int thread) {
        const int t = thread / (N / 8), c = thread % (N / 8) * 8;
        cp_async_wait_all();
        const Tile own = *(const Tile*)&k[t][c];
        float square = 0.f;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const Pair k_k = *(const Pair*)&p.k_k[c + 2 * i];
            const float left = low_half(own.x[i]) * k_k.x[0], right = high_half(own.x[i]) * k_k.x[1];
            square += left * left + right * right;
        }
        #pragma unroll
        for (int lanes = 1; lanes < N / 8; lanes *= 2) square += __shfl_xor_sync(~0u, square, lanes);
        if (c > 0) return;
        scale[t] = reciprocal_root_approx(max(square, LEAST_LENGTH * LEAST_LENGTH));
        if (STORE && t0 + t < s.length) a.scales[number(a, s, t0 + t)] = scale[t];
    }

    // Those of a thread: channels c and c + 1, four tokens from t.
    struct Share {
        Four k, a, b;
        __device__ __forceinline__ Share(const MadeKeys& keys, const Parameters& p, int t, int c)
            : k(load_four(keys.k, t, c)), b(load_four(keys.low, t, c)) {
            #pragma unroll
            for (int j = 0; j < 2; j++) {
                const float shift = p.shift[c + j], k_k = p.k_k[c + j], k_a = p.k_a[c + j];
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float raw = k.x[i].x[j], rate = rate_of(shift, b.x[i].x[j]);
                    const float n = raw * (k_k * keys.scale[t + i]);
                    k.x[i].x[j] = raw * (1.f - k_a + rate * k_a);
                    a.x[i].x[j] = -n;
                    b.x[i].x[j] = n * rate;
                }
            }
        }
    };

    // Forward: a chunk's bonuses, a separate part for each warp's 16 channels.
    struct Bonuses {
        float parts[N / 16][CHUNK];

        __device__ __forceinline__ void gather(const Operands& o, const Parameters& p, int c0) {
            const int lane = lane_id();
            const Accumulator r = widened(load_tile(&o.r[0][c0], Shape::stride));  // (t, c)
            const Accumulator k = widened(load_tile(&o.k[0][c0], Shape::stride));
            float sums[2] = {0.f, 0.f};
            #pragma unroll
            for (int e = 0; e < 8; e++) sums[e / 2 % 2] += r.c[e] * k.c[e] * p.r_k[c0 + tile_column(lane, e)];
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const float sum = quad_sum(sums[half]);
                if (lane % 4 == 0) parts[c0 / 16][lane / 4 + 8 * half] = sum;
            }
        }
        // After a barrier, by the threads that have gathered; `thread` is their number.
        __device__ __forceinline__ void store(const Arguments& a, const Sequence& s, int t0, int thread) {
            if (thread >= CHUNK || t0 + thread >= s.length) return;
            float sum = 0.f;
            #pragma unroll
            for (int i = 0; i < N / 16; i++) sum += parts[i][thread];
            a.bonus[number(a, s, t0 + thread)] = sum;
        }
    };

    // Backward: adds the bonuses' shares to the gradients of r and k, all by rows of channels from c0 on, (k, t).
    __device__ __forceinline__ void add_bonus(const Parameters& p, int c0, const Accumulator& r, const Accumulator& key,
                                              Accumulator& gr, Accumulator& gk) const {
        const int lane = lane_id();
        #pragma unroll
        for (int e = 0; e < 8; e++) {
            const float share = gbonus[tile_column(lane, e)] * p.r_k[c0 + tile_row(lane, e)];
            gr.c[e] += share * key.c[e];
            gk.c[e] += share * r.c[e];
        }
    }
    // The part of n's gradient along n, times 1 / the length; 0 if the length is below the least. From the gradients of
    // a and b it is the sums over channels of a ga and of b gb: both are the sum over values of removed gremoved, which
    // is a token's own gradient in the pairs of a with b.
    __device__ __forceinline__ void keep_along(const Accumulator& gpairs) {
        const int lane = lane_id();
        #pragma unroll
        for (int e = 0; e < 8; e++) {
            const int t = tile_row(lane, e);
            if (t == tile_column(lane, e))
                along[t] = scale[t] < 0.999f / LEAST_LENGTH ? 2.f * gpairs.c[e] * scale[t] : 0.f;
        }
    }
    // The gradients of k and low, from those of the keys, by rows of channels from c0 on, (k, t).
    __device__ __forceinline__ void store_gradients(const Arguments& to, const Parameters& p, int c0, index_t at,
                                                    index_t row, int valid, Accumulator gk, const Accumulator& ga,
                                                    const Accumulator& gb) const {
        const int lane = lane_id();
        const Accumulator raw = widened(load_transposed(&k[0][c0], Shape::stride));
        Accumulator glow = widened(load_transposed(&low[0][c0], Shape::stride));
        #pragma unroll
        for (int e = 0; e < 8; e++) {
            const int c = c0 + tile_row(lane, e), t = tile_column(lane, e);
            const float k_k = p.k_k[c], k_a = p.k_a[c], rate = rate_of(p.shift[c], glow.c[e]);
            const float n = raw.c[e] * (k_k * scale[t]);
            const float gu = (gb.c[e] * rate - ga.c[e]) * scale[t] - n * along[t];  // of k k_k
            glow.c[e] = (gb.c[e] * n + gk.c[e] * raw.c[e] * k_a) * (rate - rate * rate);
            gk.c[e] = gk.c[e] * (1.f - k_a + rate * k_a) + gu * k_k;
        }
        store_tile((bf16*)to.gk + at, row, valid, transposed(rounded(gk)));
        store_tile((bf16*)to.glow + at, row, valid, transposed(rounded(glow)));
    }
};
