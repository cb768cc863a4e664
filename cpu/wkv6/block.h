// A block of a state in registers, and the products that the passes over the state are made of.
#pragma once
#include "wkv6/rows.h"

namespace {

// The shape of a block of S in registers, for a pass over `width` lanes.
constexpr int block_vectors(int width) { return width / kLanes < 2 ? width / kLanes : 2; }
constexpr int block_rows(int vectors) { return kAccumulators / vectors < 8 ? kAccumulators / vectors : 8; }

// kRows rows of kVectors vectors, from a state whose rows have N lanes, as have the arrays' rows below. An array that
// goes with rows points at the block's first row, one that goes with lanes at its first lane.
template <int N, int kRows, int kVectors>
struct Block {
    static constexpr int kRowsHigh = kRows, kLanesWide = kVectors * kLanes;
    Vec s[kRows][kVectors];

    INLINE void load_from(const float* S) {
        UNROLL for (int a = 0; a < kRows; a++)
            UNROLL for (int b = 0; b < kVectors; b++) s[a][b] = load(S + a * N + b * kLanes);
    }
    INLINE void store_to(float* S) const {
        UNROLL for (int a = 0; a < kRows; a++)
            UNROLL for (int b = 0; b < kVectors; b++) store(S + a * N + b * kLanes, s[a][b]);
    }

    // out_i[lane] = sum over rows of factors_i[row] S[row][lane], for the kChunk rows of `factors` and `out`; added to
    // what is there unless `first`.
    INLINE void read(const float* factors, float* out, bool first) const {
        UNROLL for (int i = 0; i < kChunk; i++) read_step(factors + i * N, out + i * N, first);
    }
    INLINE void read_step(const float* factors, float* out, bool first) const {
        Vec sum[kVectors];
        UNROLL for (int b = 0; b < kVectors; b++) sum[b] = first ? zero() : load(out + b * kLanes);
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

    // sums[row], a vector whose lanes are to be summed, = S[row][lane] x[lane], added to what is there unless `first`.
    INLINE void dot(const float* x, Vec* sums, bool first) const {
        UNROLL for (int b = 0; b < kVectors; b++) {
            const Vec lane = load(x + b * kLanes);
            UNROLL for (int a = 0; a < kRows; a++)
                sums[a] = first && b == 0 ? lane * s[a][0] : sums[a] + lane * s[a][b];
        }
    }

    // out[lane] = sum over rows of S[row][lane] other[row][lane], added to what is there unless `first`.
    INLINE void multiply(const float* other, float* out, bool first) const {
        UNROLL for (int b = 0; b < kVectors; b++) {
            Vec sum = first ? zero() : load(out + b * kLanes);
            UNROLL for (int a = 0; a < kRows; a++) sum += load(other + a * N + b * kLanes) * s[a][b];
            store(out + b * kLanes, sum);
        }
    }
};

}  // namespace
