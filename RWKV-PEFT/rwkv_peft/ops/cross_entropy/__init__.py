"""Cross-entropy of given logits together with its gradient, which takes the logits' place."""

from .op import cross_entropy_

__all__ = ["cross_entropy_"]
