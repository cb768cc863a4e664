// Cross-entropy of given logits on NVIDIA GPUs, and its gradient, which overwrites the logits.
// NVRTC compiles this file, and a C++ compiler, with tests/cuda_shim, for the CPU.
#include "common/kernel.cuh"
#include "cross_entropy/arguments.cuh"
#include "cross_entropy/row.cuh"

KERNEL(CrossEntropyArguments, cross_entropy, row, ROW_THREADS, 1, 0)
