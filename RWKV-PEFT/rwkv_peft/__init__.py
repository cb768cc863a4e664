"""Bone fine-tuning for RWKV: models, wkv kernels, adapters, data, training, release."""

import logging
import os

__version__ = "0.1.0"

# GNU OpenMP's threads spin while they wait for each other. Where another program wants the same cores, the one that is
# waited for is not running, and the spinning takes its time: two runs side by side slow each other down many times. A
# short spin costs nothing measurable where the cores are free. The library reads this as torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _concerns_users(record: logging.LogRecord) -> bool:
    """Not the warning of bitsandbytes, at import, that a kernel could be downloaded: nothing here would take it."""
    return "kernels-community" not in str(record.msg)


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_concerns_users)
