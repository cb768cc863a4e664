"""Bone fine-tuning for RWKV: models, wkv kernels, adapters, data, training, release."""

import logging
import os

__version__ = "0.2.0"

# GNU OpenMP's threads spin while they wait for each other. If another program uses the same cores, the spinning takes
# time from the thread that is waited for: two runs side by side slow each other down many times. A short spin costs
# nothing measurable if the cores are free. The library reads this variable when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _concerns_users(record: logging.LogRecord) -> bool:
    """Return False for bitsandbytes' warning, at import, that a kernel could be downloaded: nothing here would use
    it."""
    return "kernels-community" not in str(record.msg)


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_concerns_users)
