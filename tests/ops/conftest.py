"""Kernels of older instruction sets than this processor's best, compiled in half the time."""

import pytest

from rwkv_peft.ops.native import cpu


@pytest.fixture(scope="session", autouse=True)
def older_levels_without_optimizations():
    """Compile levels below the best with -O1: the tests ask whether they are right, and what runs elsewhere is -O3."""
    flags, best = cpu.level_flags, cpu.best_level()

    def quick():
        return {level: own if level == best else (*own, "-O1") for level, own in flags().items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "level_flags", quick)
        yield
