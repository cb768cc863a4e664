"""How much of a model ZeRO-3 holds whole on each rank at a time."""

from torch import nn

from ..models.parts import LanguageModel


def live_parameters(model: LanguageModel) -> int:
    """Parameters of two blocks, one that computes and one that comes next, or of the embedding or the head where these
    have more. DeepSpeed's own bound is a thousand million, by which a model of 1.6B would be shared by name alone."""
    blocks = sorted(map(_size, model.blocks))
    return max(sum(blocks[-2:]), _size(model.emb), _size(model.head))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
