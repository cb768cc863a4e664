"""The steps of a run, each with the place in the data at which it begins."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Steps of a run: step_samples samples per step, epoch_steps steps per epoch, numbered first_step to total_steps -
    1; the first of them begins at sample first_sample."""

    step_samples: int
    epoch_steps: int
    total_steps: int
    first_step: int
    first_sample: int

    def samples_seen(self, done: int) -> int:
        """The sample cursor after `done` steps."""
        return self.first_sample + (done - self.first_step) * self.step_samples
