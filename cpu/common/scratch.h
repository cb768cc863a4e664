// Memory of a kernel's own, on a cache line's boundary; not initialized.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// `count` elements for as long as a call lasts.
template <class E>
class Scratch {
  public:
    explicit Scratch(int64_t count) : memory_(new char[count * sizeof(E) + 64]) {
        const uintptr_t start = reinterpret_cast<uintptr_t>(memory_.get());
        data_ = reinterpret_cast<E*>((start + 63) / 64 * 64);
    }
    E* data() { return data_; }

  private:
    std::unique_ptr<char[]> memory_;
    E* data_;
};

// Memory that a thread keeps from call to call: fresh pages cost as much as a short sequence.
class Workspace {
  public:
    ~Workspace() { free(memory_); }
    void* get(size_t size) {
        if (size > size_) {
            free(memory_);
            memory_ = aligned_alloc(64, (size + 63) / 64 * 64);
            size_ = memory_ ? size : 0;
        }
        return memory_;
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

// The calling thread's Work, or null if there is no memory for it; its content is that of the last call.
template <class Work>
Work* thread_work() {
    static thread_local Workspace workspace;
    return static_cast<Work*>(workspace.get(sizeof(Work)));
}

}  // namespace
