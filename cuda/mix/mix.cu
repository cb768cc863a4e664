// What stands between a block's matrix products, on NVIDIA GPUs, forward and backward: token shift with interpolation,
// gates, norms of heads, keys. Each reads what it needs once and writes what it gives once.
//
// nvcc compiles this file into a library with a C interface, NVRTC into a module of the kernels alone, and a C++
// compiler, with tests/cuda_shim, into a library that runs on the CPU.
#include "common/kernel.cuh"
#include "mix/elements.cuh"
#include "mix/heads.cuh"
#include "mix/layer_norm.cuh"
#include "mix/lerp.cuh"
#include "mix/lerp_affine.cuh"
#include "mix/low_rank.cuh"
#include "mix/norm_lerp.cuh"
#include "mix/square.cuh"

#define MIX_OPERATION(name, Op)                                                       \
    KERNEL(MixArguments, mix_##name##_float32, run_rows<Op<float>>, 32 * WARPS, 1, 0) \
    KERNEL(MixArguments, mix_##name##_bfloat16, run_rows<Op<bf16>>, 32 * WARPS, 1, 0)

MIX_OPERATION(lerp_forward, LerpForward)
MIX_OPERATION(lerp_backward, LerpBackward)
MIX_OPERATION(relu_square_forward, ReluSquareForward)
MIX_OPERATION(relu_square_backward, ReluSquareBackward)
MIX_OPERATION(sigmoid_gate_forward, SigmoidGateForward)
MIX_OPERATION(sigmoid_gate_backward, SigmoidGateBackward)
MIX_OPERATION(gated_residual_forward, GatedResidualForward)
MIX_OPERATION(value_residual_forward, ValueResidualForward)
MIX_OPERATION(value_residual_backward, ValueResidualBackward)
MIX_OPERATION(sum_parts, SumParts)
MIX_OPERATION(tanh_forward, TanhForward)
MIX_OPERATION(tanh_backward, TanhBackward)
MIX_OPERATION(norm_gate_forward, NormGateForward)
MIX_OPERATION(norm_gate_backward, NormGateBackward)
MIX_OPERATION(delta_keys_forward, DeltaKeysForward)
MIX_OPERATION(delta_keys_backward, DeltaKeysBackward)
MIX_OPERATION(norm_bonus_gate_forward, NormBonusGateForward)
MIX_OPERATION(norm_bonus_gate_backward, NormBonusGateBackward)
MIX_OPERATION(bonus_gate_forward, BonusGateForward)
MIX_OPERATION(bonus_gate_backward, BonusGateBackward)
MIX_OPERATION(layer_norm_sums, LayerNormSums)

// Those whose blocks have whole tokens; `resident` of them to a multiprocessor's registers.
#define MIX_TOKENS(name, resident, floats)                                                                  \
    KERNEL(MixArguments, mix_##name##_float32, name<float>, NORM_THREADS, resident, floats * sizeof(float)) \
    KERNEL(MixArguments, mix_##name##_bfloat16, name<bf16>, NORM_THREADS, resident, floats * sizeof(float))
MIX_TOKENS(layer_norm_forward, 3, MOST_CHANNELS)
MIX_TOKENS(layer_norm_backward, 3, MOST_CHANNELS)
MIX_TOKENS(norm_lerp_forward, NORM_LERP_BLOCKS, 2 * MOST_MIXED)
MIX_TOKENS(norm_lerp_backward, 3, 2 * MOST_MIXED)

// A lerp's weights of rank K.
#define MIX_LOW_RANK(K)                                                                                         \
    KERNEL(MixArguments, mix_lerp_low_forward_##K, low_forward<K>, LOW_THREADS, 1, sizeof(LowForwardShared<K>)) \
    KERNEL(MixArguments, mix_lerp_low_backward_##K, low_backward<K>, LOW_THREADS* LOW_SPLITS<K>, 1,             \
           sizeof(LowBackwardShared<K>))
MIX_LOW_RANK(32)
MIX_LOW_RANK(64)

// Points that an adapter of rank R bends.
#define MIX_AFFINE(R)                                                                                       \
    KERNEL(MixArguments, mix_lerp_affine_forward_##R, lerp_affine_forward<R>, AFFINE_FORWARD_THREADS, 2,    \
           sizeof(AffineForwardShared))                                                                     \
    KERNEL(MixArguments, mix_lerp_affine_backward_##R, lerp_affine_backward<R>, AFFINE_BACKWARD_THREADS, 1, \
           sizeof(AffineBackwardShared))
MIX_AFFINE(16)
MIX_AFFINE(32)
MIX_AFFINE(64)

// max(x, 0)^2 between adapters of rank R.
#define MIX_SQUARE(R)                                                                             \
    KERNEL(MixArguments, mix_square_forward_##R, (square<R, Square>), SQUARE_THREADS, 1,          \
           sizeof(SquareShared<R, Square>))                                                       \
    KERNEL(MixArguments, mix_square_backward_##R, (square<R, SquareGradient>), SQUARE_THREADS, 1, \
           sizeof(SquareShared<R, SquareGradient>))
MIX_SQUARE(16)
MIX_SQUARE(32)
MIX_SQUARE(64)
MIX_SQUARE(128)
