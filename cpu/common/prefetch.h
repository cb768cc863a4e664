// Memory brought into the second-level cache before its turn. Reaching past a tensor does no harm.
#pragma once
#include <cstdint>

#include "common/vectors.h"

namespace {

// Some elements of a row that will be read, or written.
template <class E>
INLINE void fetch(const E* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(E)) __builtin_prefetch(row + i, 0, 2);
}
template <class E>
INLINE void fetch_to_write(const E* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / sizeof(E)) __builtin_prefetch(row + i, 1, 2);
}

// Memory that comes next, fetched in even portions while a loop takes `steps` steps over what comes now.
class Stream {
  public:
    Stream(const void* from, int64_t bytes, int64_t steps)
        : next_(static_cast<const char*>(from)), lines_((bytes / 64 + steps - 1) / steps) {}
    INLINE void step() {
        for (int64_t line = 0; line < lines_; line++, next_ += 64) __builtin_prefetch(next_, 0, 2);
    }

  private:
    const char* next_;
    int64_t lines_;
};

// Rows of memory that will be needed soon, brought into the second-level cache a few at a time while a pass computes: a
// head's rows lie too far apart for the processor to foresee them, and the first cache is the pass's.
class Ahead {
  public:
    // `steps` rows of n elements, `stride` elements apart.
    template <class Element>
    void add(const Element* rows, int64_t stride, int64_t steps, int n) {
        if (!rows || steps <= 0) return;
        part_[parts_++] = {reinterpret_cast<const char*>(rows), stride * int64_t(sizeof(Element)), steps,
                           n * int64_t(sizeof(Element))};
    }

    // Fetches the next `count` rows, of one part after the other.
    INLINE void fetch(int count) {
        for (; count > 0 && next_ < parts_; count--) {
            Part& part = part_[next_];
            for (int64_t byte = 0; byte < part.bytes; byte += 64) __builtin_prefetch(part.row + byte, 0, 2);
            part.row += part.stride;
            next_ += --part.steps == 0;
        }
    }

  private:
    struct Part {
        const char* row;
        int64_t stride, steps, bytes;
    };
    Part part_[10];
    int parts_ = 0, next_ = 0;
};

}  // namespace
