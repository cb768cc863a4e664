// Products of the rows of a step of decoding with matrices in blocks of integers, on NVIDIA GPUs, and these matrices.
// NVRTC compiles this file, and a C++ compiler, with tests/cuda_shim, for the CPU.
#include "common/kernel.cuh"
#include "decode/blocks.cuh"

#define PRODUCT(E, dtype, bits, rows)                                                                                  \
    KERNEL(DecodeArguments, decode_product_##dtype##_##bits##_##rows, (product<E, bits, rows>), PRODUCT_THREADS<rows>, \
           1, 0)
#define BLOCKS(E, dtype, bits)  \
    PRODUCT(E, dtype, bits, 1)  \
    PRODUCT(E, dtype, bits, 16) \
    KERNEL(DecodeArguments, decode_dequantize_##dtype##_##bits, (dequantize<E, bits>), DEQUANTIZE_THREADS, 1, 0)
BLOCKS(float, float32, 8)
BLOCKS(float, float32, 4)
BLOCKS(bf16, bfloat16, 8)
BLOCKS(bf16, bfloat16, 4)
