"""demo/notebook.ipynb: kept without outputs, in both languages, and run from its first cell to its last on a CPU."""

import json
import os
import sys
import tempfile
from pathlib import Path

import jsonschema
import nbformat
import yaml
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "demo" / "notebook.ipynb"
CHINESE = range(0x4E00, 0x9FFF)
# Nothing is installed, downloaded or measured at length.
SETTINGS = """
PIP = "--dry-run --no-deps --no-index --no-build-isolation -e ."
OUT = {out!r}
FLAGS = "--epoch_count 2 --answer_rows 0"
CHECK = "--quick --only card"
"""


def test_it_is_kept_without_outputs_and_says_all_in_both_languages():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
        else:
            assert any(ord(letter) in CHINESE for letter in cell.source), cell.id


def test_it_trains_talks_and_prints_what_an_issue_asks_for(tmp_path, monkeypatch, warm_environment):
    python = Path(warm_environment.get("VIRTUAL_ENV", sys.prefix)) / "bin"
    monkeypatch.setenv("PATH", f"{python}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source += SETTINGS.format(out=str(tmp_path / "out"))
    with tempfile.TemporaryDirectory() as short:  # paths of sockets end at 107 bytes
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", short)
        sockets = dict(transport="ipc", ip=f"{short}/kernel")  # a port may be taken by another test
        kernel = AsyncKernelManager(kernel_name="python3", **sockets)
        here = {"metadata": {"path": str(NOTEBOOK.parent)}}
        NotebookClient(notebook, km=kernel, startup_timeout=600, resources=here).execute()
    texts = {
        cell.id: "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert not [name for name, text in texts.items() if "error: " in text or "Traceback" in text], texts
    assert "training can run here" in texts["run-doctor"] and "Aye! 8 black kites" in texts["run-talk"]
    assert (tmp_path / "out" / "run" / "merged.pth").is_file()
    block = texts["run-figures"].partition("COPY FROM HERE\n")[2]
    _, report, _, results, _ = block.split("```")
    schema = json.loads((ROOT / "docs/reference/report.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(json.loads(report.removeprefix("json\n")), schema)
    *_, last = results.strip().splitlines()
    assert json.loads(last)["step"] == "card" and json.loads(last)["outcome"] == "measured"
    template = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/figures.yml").read_text(encoding="utf-8"))
    assert "COPY FROM HERE" in str(template) and template["name"] in str(notebook)
