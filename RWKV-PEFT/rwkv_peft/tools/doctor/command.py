"""Report what this machine can do, what is missing, and the command that mends it.

    rwkv-peft doctor
    rwkv-peft doctor --model FILE

Exit code 0 if training can run here, else 1. Nothing is changed, but kernels that compile on first use are compiled,
because only that tells whether they work. With --model it says instead what a file holds, and which commands suit it;
exit code 1 if none does.
"""

import sys
from collections.abc import Iterator

from ...cli.installing import how_to_install
from ...cli.parser import Parser
from .devices import check_deepspeed, check_devices, check_kernels, check_memory, check_tools
from .packages import MISSING, OK, Finding, check_optional, check_package, check_python, installed, requirements


def examine() -> Iterator[Finding]:
    """Yield every Finding, the cheap ones first; checks that need a missing package or a failing GPU are left out."""
    yield from check_python()
    standing = {}
    for requirement in requirements():
        finding = check_package(requirement)
        standing[requirement.name] = finding.status
        yield finding
    yield from check_tools()
    if standing.get("torch") == OK:
        devices = list(check_devices())
        yield from devices
        if all(finding.status != MISSING for finding in devices):
            yield from check_kernels()
    if standing.get("deepspeed") == OK:
        yield from check_deepspeed()
    yield from check_memory()
    yield from check_optional()


def main(argv: list[str]) -> int:
    """Print the report; -> 0 if nothing that training needs is missing, else 1."""
    parser = Parser(prog="rwkv-peft doctor", description="Say what this machine can do and what is missing.")
    parser.add_argument(
        "--model", metavar="FILE", help="say instead what this file or folder holds, and which commands suit it"
    )
    args = parser.parse_args(argv)
    if not installed("torch"):  # there is no environment yet, and little to look at
        print(f"no environment: this Python, {sys.executable}, has no torch; {how_to_install()}")
        return 1
    if args.model:
        from .model import report  # which imports torch

        return report(args.model)
    missing = []
    for finding in examine():
        print(f"{finding.name:18} {finding.status:8} {finding.text}", flush=True)
        if finding.remedy:
            print(f"{'':18} {'':8} -> {finding.remedy}")
        if finding.status == MISSING:
            missing.append(finding.name)
    print(f"\ntraining cannot run here: see {', '.join(missing)} above" if missing else "\ntraining can run here")
    return 1 if missing else 0
