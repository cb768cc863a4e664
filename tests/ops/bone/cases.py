"""Inputs of Bone's kernels, the formulas, and the error bound of the kernels."""

import torch

# tokens, in, out, rank: odd counts of tokens, ranks that are no whole number of vectors, one shard, many tiles
SIZES = [
    *((1, 480, 96, 32), (7, 128, 192, 64), (301, 192, 64, 64), (530, 36, 24, 12), (131, 30, 15, 5)),
    *((33, 80, 40, 20), (300, 80, 32, 16), (260, 96, 48, 48), (40, 256, 384, 128)),
]
FACTOR = 0.3  # of the shift, as bat-in-scaled has; bat-in's is 1


def tensors(sizes, dtype, spread=1):
    """x, bone, g, dz; x and g are rows that lie `spread` rows apart."""
    tokens, in_features, out_features, rank = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = (spread * tokens, in_features), (in_features // rank, rank, rank), (spread * tokens, out_features)
    x, bone, g, dz = (torch.randn(shape, generator=generator) for shape in (*shapes, (tokens, in_features)))
    x, bone, g, dz = (t.to(dtype) for t in (x, 0.1 * bone, g, dz))
    return [x, bone, g, dz], [x[::spread], bone, g[::spread], dz]


def plain(x, bone, g, dz):
    """z, shift, dx and the gradient of bone, by the formula."""
    rank = bone.shape[-1]
    shards = x.unflatten(1, (-1, rank))
    u = torch.einsum("bij,tbj->tbi", bone, shards)
    du = dz.unflatten(1, (-1, rank)) + FACTOR * g.unflatten(1, (-1, rank)).sum(1)[:, None]
    dx = dz + torch.einsum("tbi,bij->tbj", du, bone).flatten(1)
    return (shards + u).flatten(1), FACTOR * u.sum(1), dx, torch.einsum("tbi,tbj->bij", du, shards)


def merged(rows, bone):
    """W + W B + B by output block."""
    count, rank, _ = bone.shape
    blocks_ = rows.view(count, rank, -1, rank)  # (a, i, b, j)
    return (blocks_ + torch.einsum("aibk,akj->aibj", blocks_, bone) + bone[:, :, None]).reshape(rows.shape)


def merged_gradient(rows, bone, d):
    """The gradient of bone, given that of merged(rows, bone)."""
    count, rank, _ = bone.shape
    rows, d = rows.view(count, rank, -1, rank), d.view(count, rank, -1, rank)
    return torch.einsum("aibk,aibj->akj", rows, d) + d.sum(2)


def total(x, tile):
    """Sums over shards as wide as tile, the last one padded."""
    rank = tile.shape[1]
    return (torch.nn.functional.pad(x, (0, -x.shape[1] % rank)).unflatten(1, (-1, rank)).sum(1),)


def tiled(x, tile):
    """x + tile, repeated."""
    return (x + tile.repeat(1, x.shape[1] // tile.shape[1] + 1)[:, : x.shape[1]],)


def assert_as_exact_as_torch(results, inputs, formula):
    """Within twice the error of the formula in the inputs' own dtype, or of rounding to that dtype."""
    exact = formula(*(t.double() for t in inputs))
    for result, low, true in zip(results, formula(*inputs), exact):
        rounding = (true.to(result.dtype).double() - true).norm()
        assert result.dtype == inputs[0].dtype
        assert (result.double() - true).norm() <= 2 * torch.maximum((low.double() - true).norm(), rounding)
