// What stands between a block's matrix products, on NVIDIA GPUs, forward and backward: token shift with interpolation,
// gates, norms of heads, keys. Each reads what it needs once and writes what it gives once.
//
// nvcc compiles this file into a library with a C interface, NVRTC into a module of the kernels alone, and a C++
// compiler, with tests/cuda_shim, into a library that runs on the CPU.
#include "common/device.cuh"
#include "mix/elements.cuh"
#include "mix/heads.cuh"
#include "mix/lerp.cuh"

// A kernel; and, but in a module, NAME_run(arguments, blocks, stream), which enqueues it and returns CUDA's error code.
#ifdef __CUDACC_RTC__
#define MIX_RUN(name)
#else
#define MIX_RUN(name)                                                            \
    extern "C" int name##_run(const MixArguments* a, int blocks, void* stream) { \
        return launch(name, dim3(blocks), dim3(32 * WARPS), 0, stream, *a);      \
    }
#endif
#define MIX_KERNEL(name, Op)                                                                                 \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) name(const MixArguments a) { run_rows<Op>(a); } \
    MIX_RUN(name)
#define MIX_OPERATION(name, Op)                 \
    MIX_KERNEL(mix_##name##_float32, Op<float>) \
    MIX_KERNEL(mix_##name##_bfloat16, Op<bf16>)

MIX_OPERATION(lerp_forward, LerpForward)
MIX_OPERATION(lerp_backward, LerpBackward)
MIX_OPERATION(relu_square_forward, ReluSquareForward)
MIX_OPERATION(relu_square_backward, ReluSquareBackward)
MIX_OPERATION(sigmoid_gate_forward, SigmoidGateForward)
MIX_OPERATION(sigmoid_gate_backward, SigmoidGateBackward)
MIX_OPERATION(value_residual_forward, ValueResidualForward)
MIX_OPERATION(value_residual_backward, ValueResidualBackward)
MIX_OPERATION(norm_gate_forward, NormGateForward)
MIX_OPERATION(norm_gate_backward, NormGateBackward)
MIX_OPERATION(delta_keys_forward, DeltaKeysForward)
MIX_OPERATION(delta_keys_backward, DeltaKeysBackward)
MIX_OPERATION(norm_bonus_gate_forward, NormBonusGateForward)
MIX_OPERATION(norm_bonus_gate_backward, NormBonusGateBackward)
