// Products of the rows of a step of decoding with matrices in blocks of integers, on NVIDIA GPUs, and these matrices.
// NVRTC compiles this file, and a C++ compiler, with tests/cuda_shim, for the CPU.
#include "common/kernel.cuh"
#include "decode/blocks.cuh"

#define PRODUCT(bits, rows) \
    KERNEL(DecodeArguments, decode_product_##bits##_##rows, (product<bits, rows>), PRODUCT_THREADS<rows>, 1, 0)
#define BLOCKS(bits)  \
    PRODUCT(bits, 1)  \
    PRODUCT(bits, 16) \
    KERNEL(DecodeArguments, decode_dequantize_##bits, (dequantize<bits>), DEQUANTIZE_THREADS, 1, 0)
BLOCKS(8)
BLOCKS(4)
