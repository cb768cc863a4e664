// What Bone's variants compute besides the product with the frozen weight, on CPUs: see blocks_affine.h (bat-in),
// blocks_merge.h (bat-out) and blocks_shards.h (bone).
//
// Each function passes over its large tensors once. A few rows by one block of columns come into the cache, are multiplied
// there by a small matrix (blocks_plain.h, blocks_pairs.h, blocks_amx.h), and leave. Tensors are of one type, float or bfloat16, with sums in
// float; rows of those that are only read may lie apart by a stride, everything else is contiguous. Gradients of
// matrices are added up in an order that does not depend on the number of threads.
#include "blocks_affine.h"
#include "blocks_merge.h"
#include "blocks_plain.h"
#include "blocks_shards.h"
#if defined(__AMX_BF16__)
#include "blocks_amx.h"
#elif defined(__AVX512BF16__)
#include "blocks_pairs.h"
#endif

namespace {

#if defined(__AMX_BF16__)
using HalfMath = Amx;

// to (columns, rows) = the transpose of x (rows, columns).
void transpose(Rows<const Bfloat16> x, Bfloat16* to, int64_t rows, int64_t columns, int threads) {
    constexpr int64_t kPanel = 128;  // columns whose lines of `to` are written at one time
    const int64_t panels = (columns + kPanel - 1) / kPanel;
#pragma omp parallel for num_threads(useful(threads, panels, rows * columns)) schedule(static)
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

}  // namespace

// Calls `call` with E the tensors' type and Math its arithmetic.
#define BY_TYPE(call)              \
    if (bfloat16) {                \
        using E = Bfloat16;        \
        using Math = HalfMath;     \
        (void)sizeof(Math);        \
        call;                      \
    } else {                       \
        using E = float;           \
        using Math = Plain;        \
        (void)sizeof(Math);        \
        call;                      \
    }

template <class E>
static const E* in(const void* p) { return static_cast<const E*>(p); }
template <class E>
static E* out(void* p) { return static_cast<E*>(p); }

extern "C" {

// Whether this library may run here. Linux lends the matrix unit's registers to a process that asks.
int blocks_start() {
#if defined(__AMX_BF16__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return 1;
#endif
}

void blocks_affine(const void* x, int64_t x_stride, const void* bone, void* z, void* shift, int64_t tokens, int64_t in_features,
                   int64_t rank, int bfloat16, int threads) {
    BY_TYPE((affine<Math, E>({in<E>(x), x_stride}, in<E>(bone), out<E>(z), out<E>(shift), tokens, in_features, rank, threads)))
}

void blocks_affine_backward(void* d, const void* g, int64_t g_stride, const void* x, int64_t x_stride, const void* bone, float* d_bone,
                            int64_t tokens, int64_t in_features, int64_t out_features, int64_t rank, int bfloat16, int threads) {
    BY_TYPE((affine_backward<Math, E>(out<E>(d), {in<E>(g), g_stride}, {in<E>(x), x_stride}, in<E>(bone), d_bone, tokens, in_features,
                                      out_features, rank, threads)))
}

void blocks_merge(const void* w, const void* bone, void* merged, float* d_bone, int64_t count, int64_t in_features, int64_t rank,
                  int bfloat16, int threads) {
    BY_TYPE((merge<Math, E>(in<E>(w), in<E>(bone), out<E>(merged), d_bone, count, in_features, rank, threads)))
}

#if defined(__AMX_BF16__)
void blocks_transpose(const void* x, int64_t x_stride, void* to, int64_t rows, int64_t columns, int threads) {
    transpose({in<Bfloat16>(x), x_stride}, out<Bfloat16>(to), rows, columns, threads);
}
#endif

void blocks_shard_sum(const void* x, int64_t x_stride, void* total, int64_t tokens, int64_t in_features, int64_t rank, int bfloat16,
                      int threads) {
    BY_TYPE(shard_sum<E>({in<E>(x), x_stride}, out<E>(total), tokens, in_features, rank, threads))
}

void blocks_add_tiled(void* y, const void* tile, int64_t tokens, int64_t width, int64_t rank, int bfloat16, int threads) {
    BY_TYPE(add_tiled<E>(out<E>(y), in<E>(tile), tokens, width, rank, threads))
}
}
