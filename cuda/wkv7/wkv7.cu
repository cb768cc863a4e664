// RWKV-7's recurrence ("Goose", Peng et al. 2025, arXiv 2503.14456) on NVIDIA GPUs, forward and backward.
//
// For one head, S its state (V, K):  S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ,  y_t = S_t r_t,
// d_t = exp(-e^(-1/2) sigmoid(w_t)).
//
// Backward, with dS_t = dL/dS_t once y_t's share is in it, S_{t-1} a_t called removed and its gradient gremoved:
//     dS_t = (dS_{t+1} diag(d_{t+1}) + gremoved_{t+1} a_{t+1}ᵀ) + gy_t r_tᵀ
//     gr = S_tᵀ gy    gk = dSᵀ v    gv = dS k    gb = dSᵀ removed    gremoved = dS b    ga = S_{t-1}ᵀ gremoved
//     gradient of d = for each column the sum of dS S_{t-1}
// The states are computed again from those that forward has saved, never stepped back in time, which would divide their
// errors by the decays.
//
// The kernels take bf16 and head size 64. One thread block walks one head of one sequence in chunks of 16 tokens; the
// sequence may have any length, and its state (or its gradient) stays in registers throughout. As in other
// recurrences with a delta rule (Yang et al. 2024, arXiv 2406.06484), a chunk unrolls into matrix products. With c_t
// the product of the decays from the chunk's start to token t, per channel, and S the state at the chunk's start, the
// operands (rows of tokens)
//     r_t c_t    a_t c_{t-1}    k_t / c_t    b_t / c_t
// give matrices of token pairs (a reads only earlier tokens, r also its own), e.g. a_k(t, s) = (a_t c_{t-1}) .
// (k_s / c_s), and with whole = c of the last token and the rows of removed, V, Y being tokens:
//     removed = (I - a_b)⁻¹ (a Sᵀ + a_k V)
//     Y       = r Sᵀ + r_k V + r_b removed
//     S_end   = (S + removedᵀ b + Vᵀ k) diag(whole)
// No decay is below 0.545, so 1 / c stays below 2e4: neither bf16 nor float32 needs more care. Products run on tensor
// cores in bf16 with float32 sums (common/tile.cuh); but the triangular system is inverted in float32, and applied in
// twice bf16's digits: its entries may cancel if tokens remove writes of others in the chunk.
//
// Forward saves the state before each chunk in bf16, because backward reads it only in products. With dS the gradient
// of S_end times whole, and g before a name for a gradient, backward computes for each chunk
//     gremoved = (I - a_b)⁻ᵀ (r_bᵀ gY + b dSᵀ)
//     gV       = r_kᵀ gY + a_kᵀ gremoved + k dSᵀ
//     ga_b, ga_k, gr_b, gr_k = gremoved removedᵀ, gremoved Vᵀ, gY removedᵀ, gY Vᵀ, masked as the pairs are
//     gr = gY S + gr_k k + gr_b b                  ga = gremoved S + ga_k k + ga_b b    (of the operands)
//     gk = V dS + gr_kᵀ r + ga_kᵀ a                gb = removed dS + gr_bᵀ r + ga_bᵀ a
//     dS_start = dS + gYᵀ r + gremovedᵀ a
// and the gradient of the log of a token's decay has, per channel, the terms across the whole chunk, and those of the
// operands that contain the decay as a factor or a divisor:
//     sum over v of S dS + sum over s of (k V dS + b removed dS)_s
//         + sum over s >= t of (r gr - k gk - b gb)_s + sum over s > t of (a ga)_s
// All terms that cancel are the same rounded numbers. With few heads, groups of tokens take a sequence's place
// (groups.cuh). Other dtypes and head sizes are computed in torch (ops/recurrence/chunked.py).
//
// NVRTC compiles this file, and a C++ compiler, with tests/cuda_shim, for the CPU.
#include "common/device.cuh"
#include "wkv7/arguments.cuh"
#include "wkv7/backward.cuh"
#include "wkv7/forward.cuh"
#include "wkv7/groups.cuh"

RECURRENCE_KERNEL(wkv7_forward_64, chunked_forward, 256, 2, sizeof(ForwardShared))
RECURRENCE_KERNEL(wkv7_backward_64, chunked_backward, 128, 3, sizeof(BackwardShared))
RECURRENCE_KERNEL(wkv7_forward_groups_64, chunked_groups<false>, 256, 2, sizeof(GroupShared))
RECURRENCE_KERNEL(wkv7_backward_groups_64, chunked_groups<true>, 256, 2, sizeof(GroupShared))
RECURRENCE_KERNEL(wkv7_forward_scan_64, scan_groups<false>, 128, 4, sizeof(ScanShared))
RECURRENCE_KERNEL(wkv7_backward_scan_64, scan_groups<true>, 128, 4, sizeof(ScanShared))
