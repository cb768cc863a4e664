"""Cross-entropy of given logits together with its gradient, which overwrites the logits."""

from .op import cross_entropy_

__all__ = ["cross_entropy_"]
