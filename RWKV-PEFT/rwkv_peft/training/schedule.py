"""Learning-rate schedules as functions of the optimizer step."""

import math

WSD_DECAY = 0.1  # the share of the run that warmup-stable-decay spends on its final descent


def learning_rate(step, *, total_steps, lr_init, lr_final, warmup_steps=0, schedule="cosine"):
    """The learning rate of optimizer step `step` (0-based) of `total_steps`.

    Rises linearly from lr_init / warmup_steps to lr_init over warmup_steps, then goes to lr_final by the last step:
    "cosine" and "linear" over what remains, "wsd" (warmup, stable, decay) in the last tenth of the run, "constant" not
    at all.
    """
    if step < warmup_steps:
        return lr_init * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr_init
    start = warmup_steps
    if schedule == "wsd":
        start = max(warmup_steps, total_steps - math.ceil(total_steps * WSD_DECAY))
        if step < start:
            return lr_init
    progress = min(1.0, (step - start) / max(1, total_steps - 1 - start))
    if schedule == "cosine":
        return lr_final + (lr_init - lr_final) * 0.5 * (1 + math.cos(math.pi * progress))
    return lr_init + (lr_final - lr_init) * progress
