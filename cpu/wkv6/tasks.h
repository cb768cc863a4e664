// Splits a call into tasks for threads.
#pragma once
#include "wkv6/arguments.h"
#include "wkv6/rows.h"

namespace {

constexpr int64_t kStepsForThreads = 1 << 18;  // state elements x steps below which waking a thread costs more

// The tasks of a call: sequence by sequence, head by head, block of values by block of values.
struct Plan {
    int64_t tasks;
    int threads, blocks, block;
};

Plan plan(const Arguments& a) {
    const int64_t heads = a.sequences * a.heads;
    const int64_t work = a.tokens * a.heads * a.head_size * a.head_size;
    Plan p{heads, work < kStepsForThreads ? 1 : a.threads, 1, kSmallestValueBlock};
    while (p.block < a.head_size) p.block *= 2;
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

}  // namespace
