// What the programs of this folder have in common: small programs without Python and torch around the kernels, for
// compute-sanitizer. A case owns what its kernels are told, each tensor in memory of its very size; prints a line of
// JSON; and is right where CUDA reports no error and all results are finite.
//
//   nvcc -std=c++17 -O2 -lineinfo -arch=native -I cuda benchmarks/kernel_driver/mix.cu -o driver && ./driver
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>
#include "common/device.cuh"

#ifndef __CUDACC__  // with tests/cuda_shim a GPU's memory is the machine's
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMalloc(void** at, size_t bytes) { return *at = std::malloc(bytes), cudaSuccess; }
inline cudaError_t cudaFree(void* at) { return std::free(at), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
    return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
#endif

// A kernel whose blocks have as many threads as it is compiled for, launched: CUDA's error code.
template <class Arguments>
struct Kernel {
    int (*run)(const Arguments*, int, int, int, void*);  // common/kernel.cuh's NAME_run
    int threads;                                         // and NAME_threads

    int operator()(const Arguments& a, int blocks) const { return run(&a, blocks, threads, 1, nullptr); }
};
template <class Arguments>
Kernel<Arguments> kernel_of(int (*run)(const Arguments*, int, int, int, void*), int threads) {
    return {run, threads};
}
#define LAUNCHER(name) kernel_of(name##_run, name##_threads)

inline int quotient_up(index_t x, index_t y) { return int((x + y - 1) / y); }

template <class E>
constexpr const char* DTYPE = std::is_same_v<E, float> ? "float32" : "bfloat16";

inline unsigned short upper_bits(float x) {  // as bf16: truncated, which serves here
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return (unsigned short)(bits >> 16);
}
inline void assign(float& to, float value) { to = value; }
inline void assign(bf16& to, float value) { to.bits = upper_bits(value); }

class Case {
  public:
    explicit Case(std::string name) : name(std::move(name)) {}
    Case(const Case&) = delete;
    ~Case() {
        for (const Memory& memory : memories) cudaFree(memory.at);
    }

    // Numbers between low and high that look random and are the same on every machine.
    template <class E>
    E* input(size_t count, float low = -1, float high = 1) {
        std::vector<E> values(count);
        for (E& value : values) {
            seed = seed * 1664525u + 1013904223u;
            assign(value, low + (high - low) * float(seed >> 8) / 16777216.0f);
        }
        return given(values);
    }
    template <class T>
    T* given(const std::vector<T>& values) {
        return (T*)take(values.data(), values.size() * sizeof(T), 0);
    }
    // NaN until a kernel writes it, all of which is due.
    template <class E>
    E* result(size_t count) {
        return (E*)take(nullptr, count * sizeof(E), sizeof(E));
    }
    // The same for what need not be written whole.
    template <class E>
    E* room(size_t count) {
        return (E*)take(nullptr, count * sizeof(E), 0);
    }

    // A launcher's status.
    void launched(int code) {
        if (status == cudaSuccess) status = (cudaError_t)code;
    }

    bool right() {
        const cudaError_t after = cudaDeviceSynchronize();
        if (status == cudaSuccess) status = after;
        bool good = status == cudaSuccess;
        for (const Memory& memory : memories) good = good && finite(memory);
        std::printf("{\"case\": \"%s\", \"right\": %s, \"error\": \"%s\"}\n", name.c_str(), good ? "true" : "false",
                    cudaGetErrorString(status));
        return good;
    }

  private:
    struct Memory {
        void* at;
        size_t bytes, element;  // bytes of an element of a result, else 0
    };

    void* take(const void* values, size_t bytes, size_t element) {
        const std::vector<unsigned char> nan(values ? 0 : bytes, 0xff);
        void* at = nullptr;
        launched(cudaMalloc(&at, bytes));
        launched(cudaMemcpy(at, values ? values : nan.data(), bytes, cudaMemcpyHostToDevice));
        memories.push_back({at, bytes, element});
        return at;
    }
    static bool finite(const Memory& memory) {
        if (memory.element == 0) return true;
        std::vector<unsigned char> values(memory.bytes);
        if (cudaMemcpy(values.data(), memory.at, memory.bytes, cudaMemcpyDeviceToHost) != cudaSuccess) return false;
        for (size_t i = memory.element; i <= memory.bytes; i += memory.element)  // an exponent is in the last two bytes
            if ((values[i - 1] & 0x7f) == 0x7f && values[i - 2] & 0x80) return false;
        return true;
    }

    std::string name;
    unsigned seed = 1;
    cudaError_t status = cudaSuccess;
    std::vector<Memory> memories;
};
