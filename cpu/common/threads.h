// Work split among threads.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kWorkForThreads = 1 << 15;  // elements below which waking a thread costs more than it saves

struct Range { int64_t begin, end; };

// One of `parts` parts of [0, count).
inline Range share(int64_t count, int64_t part, int64_t parts) {
    return {count * part / parts, count * (part + 1) / parts};
}

// How many of `threads` threads are worth waking for `count` pieces of work on so many elements in all.
inline int useful(int threads, int64_t count, int64_t elements) {
    return elements < kWorkForThreads ? 1 : static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
}

// work(begin, end, thread) over [0, count), split among threads.
template <class Work>
void parallel(int64_t count, int64_t elements, int threads, const Work& work) {
    threads = useful(threads, count, elements);
    if (threads == 1) return work(0, count, 0);
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
        const Range mine = share(count, thread, omp_get_num_threads());
        work(mine.begin, mine.end, thread);
    }
}

}  // namespace
