"""Open the rewards of a run before it trains, and check that they can judge answers to each of its prompts."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ...config import RunConfig
from ...config.objective import REWARDS
from ...data.answer_samples import PromptSamples
from ...data.samples import Samples
from ...rewards import Rewards


@contextmanager
def judging(config: RunConfig, data: Sequence[Samples]) -> Iterator[Rewards | None]:
    """Within, have the Rewards of a run, None if its objective needs none. Raises UserError for rewards that cannot be
    opened, and for a row of its data that lacks what they read."""
    objective = config.objective
    if REWARDS not in objective.needs:
        yield None
        return
    with Rewards.open(objective.reward, objective.weights) as rewards:
        for samples in data:
            assert isinstance(samples, PromptSamples)
            rewards.check_rows(map(json.loads, samples.rows))
        yield rewards
