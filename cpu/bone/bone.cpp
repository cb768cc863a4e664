// The operations of Bone's variants beside the product with the frozen weight, on CPUs: see affine.h (bat-in), merge.h
// (bat-out) and shards.h (bone).
//
// Each function passes over its large tensors once. A few rows by one block of columns come into the cache, are
// multiplied there by a small matrix (plain.h, pairs.h, amx.h), and leave. Tensors are of one type, float or bfloat16,
// with sums in float; rows of those that are only read may lie apart by a stride, everything else is contiguous.
// Gradients of matrices are added up in an order that does not depend on the number of threads.
#include <type_traits>

#include "bone/affine.h"
#include "bone/arguments.h"
#include "bone/merge.h"
#include "bone/plain.h"
#include "bone/shards.h"
#include "common/dispatch.h"
#include "common/prefetch.h"
#if defined(__AMX_BF16__)
#include "bone/amx.h"
#elif defined(__AVX512BF16__)
#include "bone/pairs.h"
#endif

namespace {

#if defined(__AMX_BF16__)
using HalfMath = Amx;

// to (columns, rows) = the transpose of x (rows, columns).
void transpose(Rows<const Bfloat16> x, Bfloat16* to, int64_t rows, int64_t columns, int threads) {
    constexpr int64_t kPanel = 128;  // columns whose lines of `to` are written at one time
    const int64_t panels = (columns + kPanel - 1) / kPanel;
    const int wanted = useful(threads, panels, rows * columns);
#pragma omp parallel for num_threads(wanted) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t t = 0; t < rows; t += 32)
            for (int64_t c = panel * kPanel; c < std::min((panel + 1) * kPanel, columns); c += 32) {
                for (int64_t i = t + 32; i < std::min(t + 64, rows); i++) fetch(x[i] + c, 32);
                transpose_block(to + c * rows + t, rows, x[t] + c, x.stride, std::min<int64_t>(32, rows - t),
                                std::min<int64_t>(32, columns - c));
            }
}
#elif defined(__AVX512BF16__)
using HalfMath = Pairs;
#else
using HalfMath = Plain;
#endif

// The arithmetic of tensors of E.
template <class E>
using MathOf = std::conditional_t<std::is_same<E, Bfloat16>::value, HalfMath, Plain>;

}  // namespace

extern "C" {

// True if this library may run here. Linux lends the matrix unit's registers to a process that asks.
int bone_start() {
#if defined(__AMX_BF16__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return 1;
#endif
}

BY_TYPE(bone_affine, AffineArguments,
        affine<MathOf<E>, E>({in<E>(a->x), a->x_stride}, in<E>(a->bone), out<E>(a->z), out<E>(a->shift), a->tokens,
                             a->in_features, a->rank, a->threads))
BY_TYPE(bone_affine_backward, AffineArguments,
        affine_backward<MathOf<E>, E>(out<E>(a->d), {in<E>(a->g), a->g_stride}, {in<E>(a->x), a->x_stride},
                                      in<E>(a->bone), out<E>(a->d_bone), a->tokens, a->in_features, a->out_features,
                                      a->rank, a->threads))
BY_TYPE(bone_merge, MergeArguments,
        merge<MathOf<E>, E>(in<E>(a->w), in<E>(a->bone), out<E>(a->merged), out<E>(a->d_bone), a->count, a->in_features,
                            a->rank, a->threads))
#if defined(__AMX_BF16__)
void bone_transpose(const TransposeArguments* a) {
    transpose({in<Bfloat16>(a->x), a->x_stride}, out<Bfloat16>(a->to), a->rows, a->columns, a->threads);
}
#endif

BY_TYPE(bone_shard_sum, ShardSumArguments,
        shard_sum<E>({in<E>(a->x), a->x_stride}, out<E>(a->total), a->tokens, a->in_features, a->rank, a->threads))
BY_TYPE(bone_add_tiled, AddTiledArguments,
        add_tiled<E>(out<E>(a->y), in<E>(a->tile), a->tokens, a->width, a->rank, a->threads))
}
