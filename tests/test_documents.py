"""Documents: a link leads to a file and a heading that are here; the site is built without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("", "benchmarks", "demo")  # docs/ is mkdocs' to judge
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))


def prose(path):
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """The anchors of a document's headings: their words in small letters, joined by dashes."""
    words = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in words}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):  # to another place
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


IN_CHINESE = {
    "README.md": "README.zh.md",
    **{f"docs/start/{name}.md": f"docs/zh/{name}.md" for name in "install first-run own-data models gpus".split()},
    "docs/guides/page.md": "docs/zh/page.md",
}
NAMES = "|".join(command.name for command in COMMANDS)
FILES = r"\b[\w.-]+\.(?:pth|jsonl|safetensors|png|json|lock)\b"
COMMANDS_AND_FILES = rf"rwkv-peft (?:{NAMES})\b|scripts/\w+\.sh|\w+\.py\b|{FILES}"


@pytest.mark.parametrize("english, chinese", IN_CHINESE.items())
def test_a_page_in_chinese_names_the_commands_and_files_of_the_english_one(english, chinese):
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in (english, chinese)]
    own, there = (set(re.findall(COMMANDS_AND_FILES, text)) for text in texts)
    assert own == there
    flags = [set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) for text in texts]
    assert flags[1] <= flags[0]


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_a_block_of_the_readme_runs_as_it_stands_in_a_fresh_clone(name):
    """Its programs are those of an environment that the block has made, with the extra that they need."""
    for block in re.findall(r"^```sh$(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        head, activation, rest = block.partition("\n. .venv/bin/activate")
        assert not re.findall(r"^(?:hf|rwkv-peft) .*", head, re.MULTILINE)
        assert not activation or "\nsh scripts/setup.sh" in head
        assert "\nrwkv-peft ui" not in rest or "\nsh scripts/setup.sh serve" in head


def test_the_site_is_built(tmp_path):
    """Every page is in the navigation, and every link leads to a page and heading that exist."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "reference" / "commands" / "index.html").read_text(encoding="utf-8")
    assert [command.name for command in COMMANDS if f'<h2 id="{command.name}">' not in page] == []
    assert page.count("usage: ") > len(COMMANDS)  # that of rwkv-peft itself, and one each
    assert "one GPU, on many, or on a laptop" in (tmp_path / "index.html").read_text(encoding="utf-8")  # README's
    listed = re.findall(r"\]\((.*)\)$", (tmp_path / "llms.txt").read_text(encoding="utf-8"), re.MULTILINE)
    titled = [name for name in listed if re.search(r"^# ", (tmp_path / name).read_text(encoding="utf-8"), re.MULTILINE)]
    assert listed == titled and len(set(listed)) == len(list(tmp_path.rglob("*.md"))) > 40
    assert listed[0] == "index.md" and "guides/data.md" in listed
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    fetched = r'<(?:script|img|link)\b[^>]*\b(?:src|href)="https?:(?!//arxiv)[^"]*"|class="mermaid"'  # shown offline
    assert {path.name: found for path, text in pages.items() if (found := re.findall(fetched, text))} == {}
