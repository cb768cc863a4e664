// The operations between a block's matrix products, on NVIDIA GPUs, forward and backward: token shift with
// interpolation, gates, norms of heads, keys. Each reads its inputs once and writes its results once.
// NVRTC compiles this file, and a C++ compiler, with tests/cuda_shim, for the CPU.
#include "common/kernel.cuh"
#include "mix/elements.cuh"
#include "mix/heads.cuh"
#include "mix/lerp.cuh"
#include "mix/low_rank.cuh"

#define MIX_OPERATION(name, Op) KERNEL(MixArguments, mix_##name, run_rows<Op>, 32 * WARPS, 1, 0)

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

// A lerp's weights of rank K.
#define MIX_LOW_RANK(K)                                                                                         \
    KERNEL(MixArguments, mix_lerp_low_forward_##K, low_forward<K>, LOW_THREADS, 1, sizeof(LowForwardShared<K>)) \
    KERNEL(MixArguments, mix_lerp_low_backward_##K, low_backward<K>, LOW_THREADS* LOW_SPLITS<K>, 1,             \
           sizeof(LowBackwardShared<K>))
MIX_LOW_RANK(32)
MIX_LOW_RANK(64)
