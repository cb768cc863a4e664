// Defines a kernel that takes one structure by value, with its threads per block in NAME_threads and its bytes of
// dynamic shared memory in NAME_shared.
#pragma once
#include "common/device.cuh"

#ifndef KERNEL_LAUNCH
#define KERNEL_LAUNCH(Arguments, name, threads, shared) \
    extern "C" {                                        \
    __constant__ int name##_threads = (int)(threads);   \
    __constant__ int name##_shared = (int)(shared);     \
    }
#endif

// A kernel whose code is code(arguments), and its launch. threads: those of a block, or the most if the launcher gives
// the number; resident: blocks that should fit a multiprocessor's registers; shared: bytes of dynamic shared memory.
#define KERNEL(Arguments, name, code, threads, resident, shared)                                         \
    static_assert((shared) <= MOST_SHARED, #name " needs too much shared memory");                       \
    extern "C" __global__ void __launch_bounds__(threads, resident) name(const Arguments a) { code(a); } \
    KERNEL_LAUNCH(Arguments, name, threads, shared)
