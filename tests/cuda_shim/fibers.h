// The threads of a CUDA block as fibers on one operating-system thread, and blocks spread over the machine's cores.
//
// A fiber runs until it meets a barrier that others have not reached; the order in which fibers then run is the
// caller's choice, and a wrong answer under some order is a missing barrier. Shared memory starts as NaN.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

constexpr size_t STACK = 128 * 1024;
constexpr unsigned WARP = 32;

// How the fibers of a block take turns. WARPS: a warp runs as far as it can before the next one does.
enum Order { ASCENDING, DESCENDING, SHUFFLED, WARPS_ASCENDING, WARPS_DESCENDING };
inline std::atomic<int>& order() {
    static std::atomic<int> value{ASCENDING};
    return value;
}

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack and its pointer at *from, and goes on where `to` was saved.
extern "C" void shim_switch(void** from, void* to);
asm(R"(
.text
.weak shim_switch
shim_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
struct Context {
    void* stack_pointer = nullptr;
    void prepare(char* stack, void (*entry)()) {
        void** top = (void**)((uintptr_t)(stack + STACK) & ~uintptr_t(63));
        *--top = nullptr;  // keeps the stack aligned as after a call
        *--top = (void*)entry;
        for (int i = 0; i < 6; i++) *--top = nullptr;
        stack_pointer = top;
    }
    static void go(Context& from, Context& to) { shim_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
    ucontext_t context;
    void prepare(char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void go(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

struct Copy {
    void* target;
    const void* source;
    int bytes;
};  // a null source is zeros

struct Fiber {
    Context context;
    dim3 thread;
    bool done = false, at_barrier = false;  // of the block
    unsigned long barrier_round = 0;        // how often it had opened when the fiber arrived there
    void* published = nullptr;              // what the fiber brings to a warp operation
    std::vector<Copy> copies;               // asynchronous copies under way
};

// A barrier that opens when all of its fibers have arrived.
struct Barrier {
    unsigned arrived = 0;
    unsigned long opened = 0;
};

struct Block {
    dim3 grid, shape, index;
    unsigned threads = 0, current = 0, finished = 0;
    char* dynamic = nullptr;
    std::vector<Fiber> fibers;
    Barrier barrier;
    std::vector<Barrier> warps;
    Context scheduler;
    const std::function<void()>* kernel = nullptr;

    Fiber& fiber() { return fibers[current]; }
    unsigned lane() const { return current % WARP; }
    Fiber* warp() { return &fibers[current - lane()]; }
    unsigned warp_size() const { return std::min(WARP, threads - (current - lane())); }
};

inline Block& block() {
    static thread_local Block value;
    return value;
}

inline void pause() {
    Block& b = block();
    Context::go(b.fiber().context, b.scheduler);
}

inline void wait(Barrier& barrier, unsigned expected, const std::function<void()>& when_all_are_here = {}) {
    Block& b = block();
    const unsigned long round = barrier.opened;
    if (++barrier.arrived == expected) {
        if (when_all_are_here) when_all_are_here();
        barrier.arrived = 0;
        barrier.opened++;
        return;
    }
    while (barrier.opened == round) {
        if (expected == b.threads && b.finished) {
            std::fprintf(stderr, "a thread has returned while another waits at __syncthreads\n");
            std::abort();
        }
        pause();
    }
}

inline void block_barrier() {
    Block& b = block();
    b.fiber().at_barrier = true;
    b.fiber().barrier_round = b.barrier.opened;
    wait(b.barrier, b.threads);
    b.fiber().at_barrier = false;
}

// Every lane publishes an operation's data; the last to arrive performs it for all of them.
template <class Data>
void warp_operation(Data& data, void (*perform)(Data* const* lanes, unsigned count)) {
    Block& b = block();
    b.fiber().published = &data;
    wait(b.warps[b.current / WARP], b.warp_size(), [&] {
        Data* lanes[WARP];
        for (unsigned i = 0; i < b.warp_size(); i++) lanes[i] = (Data*)b.warp()[i].published;
        perform(lanes, b.warp_size());
    });
}

inline void fiber_main() {
    (*block().kernel)();
    block().fiber().done = true;
    block().finished++;
    pause();
    std::abort();
}

inline void resume(unsigned i) {
    Block& b = block();
    b.current = i;
    Context::go(b.scheduler, b.fibers[i].context);
}

// Runs one warp until all of its fibers wait for other warps, or are done.
inline void run_warp(unsigned first) {
    Block& b = block();
    const unsigned last = std::min(first + WARP, b.threads);
    const auto stuck = [&](const Fiber& f) { return f.done || (f.at_barrier && f.barrier_round == b.barrier.opened); };
    for (bool again = true; again;) {
        again = false;
        for (unsigned i = first; i < last; i++) {
            if (stuck(b.fibers[i])) continue;
            resume(i);
            again |= !stuck(b.fibers[i]);
        }
    }
}

inline void run_block(char* stacks) {
    Block& b = block();
    b.barrier = Barrier();
    b.warps.assign((b.threads + WARP - 1) / WARP, Barrier());
    b.finished = 0;
    std::vector<unsigned> turn(b.threads);
    for (unsigned i = 0; i < b.threads; i++) {
        b.fibers[i] = Fiber();
        b.fibers[i].thread = dim3(i % b.shape.x, i / b.shape.x % b.shape.y, i / (b.shape.x * b.shape.y));
        b.fibers[i].context.prepare(stacks + i * STACK, fiber_main);
        turn[i] = order() == DESCENDING ? b.threads - 1 - i : i;
    }
    uint32_t random = 1;
    while (b.finished < b.threads) {
        if (order() == WARPS_ASCENDING || order() == WARPS_DESCENDING) {
            const unsigned count = b.warps.size();
            for (unsigned i = 0; i < count; i++) run_warp((order() == WARPS_ASCENDING ? i : count - 1 - i) * WARP);
            continue;
        }
        if (order() == SHUFFLED)
            for (unsigned i = b.threads - 1; i > 0; i--) {
                random = random * 1664525u + 1013904223u;
                std::swap(turn[i], turn[(random >> 8) % (i + 1)]);
            }
        for (unsigned i : turn)
            if (!b.fibers[i].done) resume(i);
    }
}

inline void run_grid(dim3 grid, dim3 shape, size_t dynamic_bytes, const std::function<void()>& kernel) {
    const unsigned blocks = grid.x * grid.y * grid.z, threads = shape.x * shape.y * shape.z;
    std::atomic<unsigned> next{0};
    const auto work = [&] {
        Block& b = block();
        b.grid = grid;
        b.shape = shape;
        b.threads = threads;
        b.kernel = &kernel;
        b.fibers.resize(threads);
        char* stacks = (char*)std::aligned_alloc(64, STACK * threads);
        b.dynamic = (char*)std::aligned_alloc(128, (dynamic_bytes / 128 + 1) * 128);
        for (unsigned i; (i = next++) < blocks;) {
            b.index = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
            std::memset(b.dynamic, 0xff, dynamic_bytes);
            run_block(stacks);
        }
        std::free(stacks);
        std::free(b.dynamic);
    };
    std::vector<std::thread> helpers;
    for (unsigned i = 1; i < std::min(blocks, std::thread::hardware_concurrency()); i++) helpers.emplace_back(work);
    work();
    for (auto& helper : helpers) helper.join();
}

}  // namespace shim
