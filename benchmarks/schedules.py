"""Every --lr_schedule drawn against the formula that `train.py --help` gives for it: docs/guides/schedules.png.

    python benchmarks/schedules.py [--output docs/guides/schedules.png]

Prints the largest difference between the two, relative to lr_init.
"""

import math

from common import ROOT, Parser

from rwkv_peft.config.train import SCHEDULES, learning_rate

STEPS, WARM_UP, FIRST, LAST = 200, 20, 1e-3, 1e-4


def by_formula(name, step):
    """The learning rate at a step by a schedule's formula, which is Python but for definitions after a comma."""
    formula, *definitions = SCHEDULES[name].formula.split(", D = ")
    known = {"s": step, "S": STEPS, "W": WARM_UP, "a": FIRST, "z": LAST, "pi": math.pi, "cos": math.cos}
    known |= {"min": min, "max": max, "ceil": math.ceil, "clip": lambda x: min(1.0, max(0.0, x))}
    for definition in definitions:
        known["D"] = eval(definition, {}, known)
    return eval(formula, {}, known)


def rates(name):
    """(learning rates of every step, the same by the formula)."""
    settings = dict(total_steps=STEPS, warmup_steps=WARM_UP, lr_init=FIRST, lr_final=LAST, schedule=name)
    steps = range(STEPS)
    return [learning_rate(step, **settings) for step in steps], [by_formula(name, step) for step in steps]


def main():
    parser = Parser(__doc__, output="/dev/null")
    parser.add_argument("--output", default=ROOT / "docs" / "guides" / "schedules.png")
    output = parser.parse_args().output
    from matplotlib.figure import Figure

    figure = Figure((12, 5), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    for name, axis in zip(SCHEDULES, axes.flat):
        ours, formula = rates(name)
        axis.plot(formula, color="0.7", linewidth=4, label="formula")
        axis.plot(ours, color="C0", linewidth=1, label="learning rate")
        axis.set_title(name)
        print(f"{name:<10} largest difference {max(abs(a - b) for a, b in zip(ours, formula)) / FIRST:.1e}")
    axes.flat[0].legend()
    axes.flat[-1].set_axis_off()
    figure.supxlabel(f"step of {STEPS}, {WARM_UP} of them warm-up; from {FIRST:g} to {LAST:g}")
    figure.savefig(output, dpi=80, format="png")


if __name__ == "__main__":
    main()
