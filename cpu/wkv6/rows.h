// Rows of tensors as rows of floats of a fixed length, and states likewise.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/shuffles.h"
#include "common/threads.h"
#include "common/vectors.h"

namespace {

// kAccumulators: vectors of a state that fit in registers beside their operands.
#if defined(__AVX512F__) || (defined(__aarch64__) && !defined(__AVX2__))
constexpr int kAccumulators = 16;
#else
constexpr int kAccumulators = 8;
#endif

constexpr int kTile = 64;  // steps from one checkpoint to the next
constexpr int kSpan = 16;  // steps that are prepared and computed at once
constexpr int kChunk = 8;  // steps that a pass over the state takes at once, two halves
constexpr int kHalf = 4;
constexpr int kChunks = kTile / kChunk;
constexpr int kSpanChunks = kSpan / kChunk;
constexpr int kSmallestValueBlock = 16;  // columns of S that are worth a task of their own
constexpr float kNoDecay = -87.0f;       // w of a step past the end: d is exactly 1, its gradient about 0

// The place of a sequence's head in the tensors, and the value columns of it that this task computes.
struct Task {
    int64_t length;      // steps
    int64_t stride;      // elements from one step to the next
    int64_t checkpoint;  // elements from one checkpoint of this head to the next
    int n;               // head size
    Range values;        // columns, of the padded head size
};

// Rows of kSteps steps, and a gap that shifts the next array against it: a processor takes a load for dependent on an
// earlier store whose address agrees in the last 12 bits, so arrays that walk in step must not lie a multiple of 4 KB
// apart.
template <int N, int kSteps>
struct StepRows {
    alignas(64) float at[kSteps * N];
    float gap[17 * 16];
    operator float*() { return at; }
};

// `steps` rows of n elements, `stride` apart, become kChunk rows of N floats; missing steps are `filler`, missing
// channels 0.
template <int N, class Element>
APART void pad_rows(float* to, const Element* from, int64_t stride, int steps, int n, float filler = 0.0f) {
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
        int64_t c = columns.begin;
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
APART void load_transposed_state(float* S, const float* from, int n) {
    if (!from || n < N) memset(S, 0, sizeof(float) * N * N);
    for (int i = 0; from && i < n; i += 4)
        for (int j = 0; j < n; j += 4) transpose_quads(S + j * N + i, N, from + i * n + j, n);
}

template <int N>
void store_state(float* to, const float* S, int n, Range columns) {
    const int64_t end = columns.end < n ? columns.end : n;
    for (int i = 0; i < n && columns.begin < end; i++)
        memcpy(to + i * n + columns.begin, S + i * N + columns.begin, sizeof(float) * (end - columns.begin));
}

}  // namespace
