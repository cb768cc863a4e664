// What stands around a kernel that takes one structure by value: NAME_run(arguments, blocks, stream), which enqueues it
// and returns CUDA's error code; or, in a module, what a launcher outside has to know of it.
#pragma once
#include "common/device.cuh"

// threads: of a block; shared: its bytes of dynamic shared memory.
#ifdef __CUDACC_RTC__
#define KERNEL_RUN(Arguments, name, threads, shared)  \
    extern "C" {                                      \
    __constant__ int name##_threads = (int)(threads); \
    __constant__ int name##_shared = (int)(shared);   \
    }
#else
#define KERNEL_RUN(Arguments, name, threads, shared)                                 \
    extern "C" int name##_run(const Arguments* a, int blocks, void* stream) {        \
        return launch(name, dim3(blocks), dim3(threads), (int)(shared), stream, *a); \
    }
#endif

// A kernel whose code is code(arguments), and its launch.
#define KERNEL(Arguments, name, code, threads, shared)                                            \
    extern "C" __global__ void __launch_bounds__(threads, 1) name(const Arguments a) { code(a); } \
    KERNEL_RUN(Arguments, name, threads, shared)
