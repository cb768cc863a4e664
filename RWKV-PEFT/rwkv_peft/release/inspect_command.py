"""Describe what a file holds and, with its base, how far each matrix moved: `rwkv-peft inspect FILE`.

rwkv-peft inspect adapter.safetensors --base_model base.pth --output heat.png
"""

from pathlib import Path

from ..errors import UserError
from ..files.adapters import source_of
from ..files.atomic import check_output
from ..files.base import open_base
from ..plots import plot_heat
from .contents import contents_of, formatted
from .flags import inspect_flags
from .heat import changes_of, heat_of, text_of


def main(argv: list[str]) -> int:
    """Run the command: argv -> exit code 0."""
    args = inspect_flags(argv)
    contents = contents_of(source_of(args, args.file))
    if args.output:
        check_output("--output", Path(args.output), [("the file", args.file), ("--base_model", args.base_model)])
    print(formatted(contents.lines))
    if args.base_model is None:
        return 0
    if contents.holds is None:
        raise UserError(f"{args.file} is neither a model nor an adapter that is read here, which --base_model compares")
    heat = heat_of(changes_of(open_base(args.base_model), contents.holds, args.file))
    print("\nchange of each tensor from the base, |W' - W| / |W| in %:\n" + (text_of(heat) or "none: it is the base"))
    if args.output:
        plot_heat(heat.rows, heat.columns, heat.cells, args.output)
        print(f"wrote {args.output}")
    return 0
