"""An environment for scripts in which Python begins at once."""

from pathlib import Path

import pytest

import warm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def warm_environment(tmp_path_factory, accelerator):
    """Variables by which scripts take an environment whose Python begins at once, if a fork serves; setup.sh finds
    nothing to install in it."""
    if accelerator == "gpu":
        return {}
    environment = tmp_path_factory.mktemp("environment")
    (environment / "bin").mkdir()
    (environment / "bin" / "python").symlink_to(warm.python())
    (environment / "bin" / "activate").write_text(f"PATH='{environment / 'bin'}':$PATH\n")
    command = (
        f"#!/bin/sh\nexec '{warm.python()}' '{ROOT / 'RWKV-PEFT' / 'rwkv_peft' / 'children.py'}' rwkv_peft \"$@\"\n"
    )
    (environment / "bin" / "rwkv-peft").write_text(command)
    (environment / "bin" / "rwkv-peft").chmod(0o755)
    (environment / "bin" / "uv").write_text("#!/bin/sh\n")  # all is there
    (environment / "bin" / "uv").chmod(0o755)
    return {"VIRTUAL_ENV": str(environment)}
