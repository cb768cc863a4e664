"""Requirements: bounded, locked with hashes, and the same in the image, which runs as a user."""

import re
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
OF_EACH_MACHINE = re.compile(r"torch$|nvidia-")  # what the lock has no hashes of


def lines_of_requirements():
    """(requirement, its line with the comment) of requirements.txt and all extras."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    words = [word for extra in extras.values() for word in extra]
    words += [line.partition("#")[0] for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    lines = text.splitlines() + (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for word in filter(None, map(str.strip, words)):
        if not word.startswith("rwkv-peft["):
            yield Requirement(word), next(line for line in lines if word in line and not line.startswith("requires "))


def locked():
    """{name: [(version, marker, number of hashes)]}"""
    found = {}
    entries = re.split(r"\n(?=\w)", re.sub(r"(?m)^#.*\n", "", (ROOT / "requirements.lock").read_text(encoding="utf-8")))
    for entry in entries:
        head, *hashes = entry.replace("\\\n", "").split("--hash=sha256:")
        requirement = Requirement(head.strip())
        found.setdefault(canonicalize_name(requirement.name), []).append((requirement, len(hashes)))
    return found


def test_every_requirement_has_an_upper_bound_or_a_reason():
    for requirement, line in lines_of_requirements():
        bounded = any(each.operator in ("<", "<=", "==", "~=") for each in requirement.specifier)
        assert bounded or "since" in line.partition("#")[2], line


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_the_lock_holds_every_requirement_with_hashes(python):
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.7"}
    lock = locked()
    for requirement, line in lines_of_requirements():
        due = requirement.marker is None or requirement.marker.evaluate(environment)
        if not due or OF_EACH_MACHINE.match(requirement.name):
            continue
        (pin,) = (
            pin
            for pin, _ in lock[canonicalize_name(requirement.name)]
            if not pin.marker or pin.marker.evaluate(environment)
        )
        (version,) = (each.version for each in pin.specifier)
        assert requirement.specifier.contains(version), line
    assert [name for name, entries in lock.items() if not all(hashes for _, hashes in entries)] == ["torch"]


def test_the_image_runs_as_a_user_on_a_base_by_digest_without_secrets():
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    stages = re.split(r"(?m)^FROM ", image)[1:]
    known = {stage.split()[2] for stage in stages}
    for stage in stages:
        base = stage.split()[0]
        assert base in known or re.search(r"@sha256:[0-9a-f]{64}$", base)
        if "CMD" in stage:
            assert re.search(r"(?m)^USER 1000$", stage.partition("CMD")[0])
    assert {"**/.env*", "**/*.key", "**/*.pem"} <= set((ROOT / ".dockerignore").read_text(encoding="utf-8").split())
