// Cross-entropy of given logits on NVIDIA GPUs, and its gradient, which overwrites the logits.
//
// nvcc compiles this file into a library with a C interface, NVRTC into a module with only the kernels, and a C++
// compiler, with tests/cuda_shim, into a library that runs on the CPU.
#include "common/kernel.cuh"
#include "cross_entropy/arguments.cuh"
#include "cross_entropy/row.cuh"

KERNEL(CrossEntropyArguments, cross_entropy_float32, row<float>, ROW_THREADS, 1, 0)
KERNEL(CrossEntropyArguments, cross_entropy_bfloat16, row<bf16>, ROW_THREADS, 1, 0)
