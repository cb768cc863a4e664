// Rows of tensors as rows of floats of a fixed length, states likewise, and fetching rows ahead of their use.
#pragma once
#include <cstdint>
#include <cstring>

#include "wkv6_cpu_vector.h"

namespace wkv6 {
namespace WKV6_LEVEL {
namespace {

constexpr int kTile = 64;                // steps from one checkpoint to the next
constexpr int kSpan = 16;                // steps that are prepared and computed at once
constexpr int kChunk = 8;                // steps that a pass over the state takes at once, two halves
constexpr int kHalf = 4;
constexpr int kChunks = kTile / kChunk;
constexpr int kSpanChunks = kSpan / kChunk;
constexpr int kSmallestValueBlock = 16;  // columns of S that are worth a task of their own
constexpr float kNoDecay = -87.0f;       // w of a step past the end: d is exactly 1, its gradient about 0

struct Range {
    int begin, end;
};

// Where a sequence's head lies in the tensors, and which of its value columns this task computes.
struct Task {
    int64_t length;      // steps
    int64_t stride;      // elements from one step to the next
    int64_t checkpoint;  // elements from one checkpoint of this head to the next
    int n;               // head size
    Range values;        // columns, of the padded head size
};

// Rows of kSteps steps, and a gap that shifts the next array against it: a processor takes a load for dependent on an earlier
// store whose address agrees in the last 12 bits, so arrays that walk in step must not lie a multiple of 4 KB apart.
template <int N, int kSteps>
struct Rows {
    alignas(64) float at[kSteps * N];
    float gap[17 * 16];
    operator float*() { return at; }
};

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

}  // namespace
}  // namespace WKV6_LEVEL
}  // namespace wkv6
