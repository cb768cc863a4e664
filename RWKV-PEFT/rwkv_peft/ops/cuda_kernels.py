"""The CUDA kernels besides those of the recurrences, which a run's header and `rwkv-peft doctor` name."""

from .bone.cuda import FAMILY as BONE
from .cross_entropy import CUDA as CROSS_ENTROPY
from .mix.cuda import FAMILY as MIX

# (operations, their CUDA kernels)
KERNELS = (("token shift, gates, norms", MIX), ("bat-in, Bone's shards", BONE), ("loss", CROSS_ENTROPY))
