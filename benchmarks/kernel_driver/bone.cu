// Bone's kernels: bat-in's affine form, also of a squared relu, and its gradients, bat-out's merged weight, sums over
// shards and what is added to them; products on tensor cores for each rank that has them, and the plain ones.
#include "bone/bone.cu"
#include "case.cuh"

using Launcher = Kernel<BoneArguments>;
struct Rank {
    int rank, tile;  // tile: tokens that a block takes at once
    Launcher forward, backward, merge = {}, squared_forward = {}, squared_backward = {};
};

constexpr int TOKENS = 150, SHARDS = 3, GROUPS = 2;

template <class E>
static bool products(const Rank& of) {
    Case c("bone affine, rank " + std::to_string(of.rank) + " " + DTYPE<E>);
    const int rank = of.rank, width = SHARDS * rank, tiles = quotient_up(TOKENS, of.tile);
    const int strip = of.tile, strips = tiles;
    const size_t matrices = size_t(SHARDS) * rank * rank;
    BoneArguments a = {};
    a.tokens = TOKENS, a.width = width, a.rank = rank, a.groups = GROUPS, a.strip = strip, a.factor = 0.5f;
    a.x = c.input<E>(TOKENS * width), a.bone = c.input<E>(matrices, -0.1f, 0.1f), a.z = c.result<E>(TOKENS * width);
    a.shift = c.result<E>(GROUPS * TOKENS * rank);
    c.launched(of.forward(a, tiles * GROUPS));
    a.d = c.input<E>(TOKENS * width), a.g = c.input<E>(TOKENS * rank), a.dx = c.result<E>(TOKENS * width);
    a.parts = c.result<float>(strips * matrices);
    c.launched(of.backward(a, SHARDS * strips));
    if (of.squared_forward.run) {
        a.left = c.input<E>(TOKENS * rank), a.z = c.result<E>(TOKENS * width);
        a.shift = c.result<E>(GROUPS * TOKENS * rank);
        c.launched(of.squared_forward(a, tiles * GROUPS));
        a.dx = c.result<E>(TOKENS * width), a.parts = c.result<float>(strips * matrices);
        c.launched(of.squared_backward(a, SHARDS * strips));
    }
    if (of.merge.run) {  // two output blocks
        a.x = c.input<E>(2 * rank * width), a.z = c.result<E>(2 * rank * width);
        c.launched(of.merge(a, 2 * quotient_up(width, strip)));
    }
    return c.right();
}

template <class E>
static bool shards(Launcher sum, Launcher tiled, Launcher parts) {
    Case c(std::string("bone shards ") + DTYPE<E>);
    const int rank = 20, width = 70;  // the last shard is half a one
    BoneArguments a = {};
    a.tokens = TOKENS, a.width = width, a.rank = rank, a.groups = GROUPS, a.count = 1000;
    const int blocks = quotient_up(TOKENS * rank, SHARD_THREADS);
    a.x = c.input<E>(TOKENS * width), a.total = c.result<E>(TOKENS * rank);
    c.launched(sum(a, blocks));
    a.tile = c.input<E>(GROUPS * TOKENS * rank);
    a.tiled = c.result<E>(TOKENS * width);
    c.launched(tiled(a, blocks));
    a.parts = c.input<float>(GROUPS * a.count), a.total = c.result<E>(a.count);
    c.launched(parts(a, quotient_up(a.count, SHARD_THREADS)));
    return c.right();
}

#define OF_RANK(R)                                                                                    \
    Rank {                                                                                            \
        R, ForwardProducts<R>::tokens, LAUNCHER(bone_affine_forward_products_##R),                    \
            LAUNCHER(bone_affine_backward_products_##R), LAUNCHER(bone_merge_products_##R),           \
            LAUNCHER(bone_squared_forward_products_##R), LAUNCHER(bone_squared_backward_products_##R) \
    }

int main() {
    bool right = true;
    for (const Rank& rank : {OF_RANK(16), OF_RANK(32), OF_RANK(64), OF_RANK(128)}) right &= products<bf16>(rank);
    right &= products<bf16>(
        {20, PLAIN_TOKENS, LAUNCHER(bone_affine_forward_bfloat16), LAUNCHER(bone_affine_backward_bfloat16)});
    right &= products<float>(
        {64, PLAIN_TOKENS, LAUNCHER(bone_affine_forward_float32), LAUNCHER(bone_affine_backward_float32)});
    right &=
        shards<float>(LAUNCHER(bone_shard_sum_float32), LAUNCHER(bone_tiled_float32), LAUNCHER(bone_sum_parts_float32));
    right &= shards<bf16>(LAUNCHER(bone_shard_sum_bfloat16), LAUNCHER(bone_tiled_bfloat16),
                          LAUNCHER(bone_sum_parts_bfloat16));
    return right ? 0 : 1;
}
