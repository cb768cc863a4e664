"""`rwkv-peft plot`: the curves of a run, or of several runs in one picture.

rwkv-peft plot out/bone loss.png
rwkv-peft plot out/bone out/lora compare.png
"""

import os
from pathlib import Path

from ..checkpoints.atomic import check_output
from ..cli.errors import UserError
from ..cli.parser import Parser
from ..plots import PlottedRun, metrics_of, plot_runs, read_metrics

ENDINGS = (".png", ".svg", ".pdf")


def main(argv: list[str]) -> int:
    """Draw the runs; -> the exit code."""
    parser = Parser(
        prog="rwkv-peft plot",
        synonyms={"--panels": "what it does by itself", "--smooth": "what it does by itself"},
        usage="rwkv-peft plot [-h] RUN [RUN ...] PICTURE [--x {steps,tokens}]",
        description="Draw the curves of a run, as its loss.png, or of several runs into one picture: losses, right "
        "answers, learning rate, gradient norm and speed.",
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        metavar="RUN … PICTURE",
        help="runs, by their folder or metrics.jsonl; then the .png, .svg or .pdf to write",
    )
    add("--output", metavar="PICTURE", help="the picture, if no PICTURE follows the runs")
    add("--x", choices=("steps", "tokens"), default="steps", help="x axis (default steps)")
    args = parser.parse_args(argv)
    runs = [*args.paths]
    output = Path(args.output or runs.pop())
    if not runs or any(Path(run).suffix in ENDINGS and not Path(run).is_dir() for run in runs):
        raise UserError("runs and one picture are due: rwkv-peft plot RUN loss.png")
    if output.suffix not in ENDINGS:
        raise UserError(f"{output} does not end in {', '.join(ENDINGS)}, which are drawn; give a name such as loss.png")
    check_output("the picture", output, [("a run", Path(run)) for run in runs])
    files = [metrics_of(run).absolute() for run in runs]
    shared = os.path.commonpath([file.parent.parent for file in files])
    found = [PlottedRun(os.path.relpath(file.parent, shared), read_metrics(file)) for file in files]
    plot_runs(found, output, by_tokens=args.x == "tokens")
    print(f"wrote {output}")
    return 0
