// The device's own functions: on a GPU those of ptx.cuh, elsewhere tests/cuda_shim's.
#pragma once
#ifdef __CUDACC__
#include "common/ptx.cuh"
#else
#include <cuda_shim.h>
#endif

typedef long long index_t;

// Bytes of shared memory that a block may ask for on every GPU since Ampere.
constexpr int MOST_SHARED = 99 * 1024;
