"""train.py on a machine that has CUDA graphs and no GPU: `python tests/training/train_graphed.py --cuda_graphs 1 …`.
Prints at the end how many graphs were replayed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "RWKV-PEFT"), str(ROOT / "tests")]

from rwkv_peft import gpus  # noqa: E402
from rwkv_peft.training import run  # noqa: E402
from training.graphs_emulated import Graph, emulate  # noqa: E402

if __name__ == "__main__":
    emulate(setattr)
    run.resolve_accelerator = gpus.resolve_accelerator = lambda train: "cpu"
    code = run.main(sys.argv[1:])
    print(Graph.replays, "replays")
    sys.exit(code)
