"""The objective of pre-training and of answers: predict each token that counts from those before it.

With --kl_to_base the loss of a step is

    cross-entropy of the next token + W KL(base | model)

at each token that counts, over the whole vocabulary. The direction is forward, as in Learning without Forgetting (Li
and Hoiem 2016, arXiv 1606.09282): the model keeps all that the base finds probable. Forward KL on the new task also
predicts forgetting (Shenfeld et al. 2025, arXiv 2509.04259).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..cli.parser import not_negative
from ..cli.rules import EXCLUDES, NEEDS, Rule
from ..config.objective import LOADED, Batch, Figure, Head, Losses, Objective, Passes, number_of_tokens
from ..config.rules import WHOLE
from ..config.setting import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NextToken(Objective):
    """The mean cross-entropy of the tokens that count, by their weights if they have any. kl_to_base: the weight of the
    divergence from the base in a step; validation measures the cross-entropy alone, as in runs without it."""

    name = "next_token"
    text = "the likelihood of each token that counts"
    rows = ("binidx", "sft")
    of_tokens = True
    rules = (
        Rule(
            "--kl_to_base",
            EXCLUDES,
            f"{WHOLE}, --train_parts !state, {LOADED}",
            "it compares with the base, which has to stay as it is",
            "train an adapter, from its beginning and without --train_parts; or leave it out, and take --replay",
        ),
        Rule("--forget_at_most", NEEDS, "--objective next_token", "others measure no nats a token", "leave it out"),
        Rule("--kl_to_base", EXCLUDES, "--train_type infctx", "the reference pass reads whole rows", "leave it out"),
    )
    kl_to_base: float = setting(
        0.0,
        "also keep the model near its base: so many times KL(base | model) of the next token, at each token that "
        "counts; a step takes a further forward pass",
        type=not_negative,
        metavar="WEIGHT",
    )

    @property
    def asks_base(self) -> bool:
        return self.kl_to_base > 0

    @property
    def shown(self) -> tuple[Figure, ...]:
        return (Figure("kl"),) if self.asks_base else ()

    def head(
        self,
        targets: "Tensor",
        counted: "Tensor",
        count: float,
        weights: "Tensor | None" = None,
        parts: "Tensor | None" = None,
        base: "Tensor | None" = None,
    ) -> Head:
        """The loss of positions that count, as a function for a model's head; arguments as in linear_cross_entropy.

        base: the base's hidden states there (n, C); the loss is then linear_divergence's, with the divergence. The
        head's weight is the base's too, because it does not train.
        """
        from .cross_entropy import linear_cross_entropy
        from .divergence import Divergence, linear_divergence

        of: dict[str, Any] = dict(targets=targets, counted=counted, count=count, weights=weights, parts=parts)
        if base is None:
            return partial(linear_cross_entropy, **of)
        settings = Divergence("forward", 0.5, 1.0, self.kl_to_base, beside=1.0)
        return lambda x, weight: linear_divergence((x, weight), (base, weight), settings=settings, **of)

    def loss(self, passes: Passes, batch: Batch, count: float) -> Losses:
        """Its figures are the losses of several data files, "loss/NAME", of those that count in the step; and with
        --kl_to_base a step's divergence and cross-entropy."""
        shares: Mapping[str, float] = cast(Any, batch).get("sources") or {}
        of = batch["targets"], batch["counted"], count, batch.get("weights"), batch["of_source"] if shares else None
        figures: dict[str, Tensor] = {}
        if self.asks_base and passes.trains:
            # before the model's pass, so that the activations of both are never alive together
            base = passes.base(lambda x, weight: x.reshape(-1, x.shape[-1])[batch["counted"]])
            loss, kl, nll, *parts = passes.model(self.head(*of, base))
            figures = {"kl": kl.detach(), "nll": nll.detach()}
        else:
            found = passes.model(self.head(*of))
            loss, *parts = found if shares else [found]
        named = zip(shares.items(), parts)
        return loss, figures | {f"loss/{name}": part.detach() / share for (name, share), part in named if share}

    def describe(self) -> str:
        return f"the next token's loss, and {self.kl_to_base:g} times KL(base | model)" if self.asks_base else ""

    def items(self, batch: Batch) -> "Tensor":
        return number_of_tokens(batch)
