// RWKV-6's recurrence (Peng et al. 2024, arXiv 2404.05892) on NVIDIA GPUs, forward and backward.
//
// For one head, S its state (K, V):  y_t = r_tᵀ (S_{t-1} + diag(u) k_t v_tᵀ),  S_t = diag(d_t) S_{t-1} + k_t v_tᵀ,
// d_t = exp(-exp(w_t)).
//
// One thread block walks one head of one sequence in chunks of 16 tokens; the sequence may be any length, and its
// state stays in registers throughout. Inside a chunk the recurrence unrolls into matrix products, as in gated
// linear attention (Yang et al. 2023, arXiv 2312.06635). With products taken over the chunk's tokens, per channel,
//     start(t) = product of d_x, x < t:  from the chunk's start to token t's read of the state
//     end(s)   = product of d_x, x > s:  from token s's write to the chunk's end
// and S the state at the chunk's start, the chunk gives
//     y_t   = (r_t start(t))ᵀ S + sum over s < t of scores(t, s) v_s + (sum over c of r_t u k_t) v_t
//     S_end = diag(whole) S + sum over s of (k_s end(s)) v_sᵀ
//     scores(t, s) = sum over c of r_t k_s (product of d_x, s < x < t)
// The product between s and t is start(t) end(s) / whole. To make it out of two factors that bf16 can hold, both are
// taken relative to the chunk's middle (first and second are the products of the two halves, whole = first second):
//     r_middle = r start(t) / first     k_middle = k end(s) / second     scores = r_middle k_middleᵀ, for s < t
//     r_start  = r start(t)             k_end    = k end(s)
// The largest factor is the reciprocal of eight decays, hence the cap on a decay (DECAY_CAP); scores that are not
// below the diagonal may overflow, and are never used.
//
// Products run on tensor cores in bf16 with float32 sums (common/tile.cuh). The state is float32; its transpose is
// kept in the layout of a product's result, so that it serves as an operand without moving.
//
// Backward needs the states in reverse. Forward stores one every 64 tokens (SEGMENT), in bf16; backward rebuilds the
// three between, and carries dS = dL/dS from the last token to the first:
//     dS_start = diag(whole) dS + sum over t of (r_t start(t)) gy_tᵀ
//     gr_t = start(t) S gy_t + read factor * (gscores k_middle)_t + u k_t (gy_t . v_t)
//     gk_s = end(s) dS v_s + write factor * (gscoresᵀ r_middle)_s + u r_s (gy_s . v_s)
//     gv_s = (k_s end(s)) dS + (scoresᵀ gy)_s,    gscores = gy vᵀ, for s < t
// A token's decay d_x affects four things: the state that passes through the whole chunk; the reads after x, through
// start; the writes before x, through end; and the scores that span x. So, per channel, its log has the gradient
//     whole <S, dS> + sum over t > x of r_t gr_t(across) + sum over s < x of k_s gk_s(across)
//                   + sum over t > x of r_t gr_t(inside) - sum over s >= x of k_s gk_s(inside)
// (across: the first terms of gr and gk above; inside: the second). Only the terms inside the chunk are subtracted, and
// those are the same rounded numbers on both sides. gw_x is -exp(w_x) times that gradient.
//
// The kernels take bf16 and head size 64, which all released models have; all else is computed by products of matrices
// in torch (ops/recurrence/chunked.py).
//
// NVRTC compiles this file, and a C++ compiler, with tests/cuda_shim, for the CPU.
#include "common/device.cuh"
#include "wkv6/arguments.cuh"
#include "wkv6/backward.cuh"
#include "wkv6/forward.cuh"
#include "wkv6/groups.cuh"

RECURRENCE_KERNEL(wkv6_forward_64, chunked_forward, 128, 5, sizeof(ForwardShared))
RECURRENCE_KERNEL(wkv6_backward_64, chunked_backward, 128, 3, sizeof(BackwardShared))
RECURRENCE_KERNEL(wkv6_forward_groups_64, chunked_groups<false>, 128, 5, sizeof(GroupShared))
RECURRENCE_KERNEL(wkv6_backward_groups_64, chunked_groups<true>, 128, 5, sizeof(GroupShared))
RECURRENCE_KERNEL(wkv6_forward_scan, scan_groups<false>, 128, 4, 0)
RECURRENCE_KERNEL(wkv6_backward_scan, scan_groups<true>, 128, 4, 0)
