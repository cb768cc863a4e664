"""Pages that mkdocs makes of the source: the help of every command, and the documents at the repository's root; and for
readers that are programs llms.txt (llmstxt.org), with the Markdown of every page beside it.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

from jinja2 import Environment
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPIED = {
    "README.md": "index.md",
    "README.zh.md": "zh/index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "concepts/security.md",
    "CHANGELOG.md": "changelog.md",
}
PICTURE = "demo/loss.png"  # README's; docs/ has the others


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    for name, page in COPIED.items():
        files.append(File.generated(config, page, content=linked((ROOT / name).read_text(encoding="utf-8"), page)))
    files.append(File.generated(config, PICTURE, abs_src_path=str(ROOT / PICTURE)))
    return files


def on_env(env: Environment, config: MkDocsConfig, files: Files) -> Environment:
    """Write each page's Markdown under the name of its source, so that links between pages hold, and llms.txt, which
    lists them in the order of the navigation."""
    site = Path(config.site_dir)
    pages = [file.page for file in files.documentation_pages() if file.page is not None]
    page = next(page for page in pages if page.is_homepage)
    lines, section = [f"# {config.site_name}", f"\n> {config.site_description}\n"], None
    while page is not None:
        if page.parent is not section and (section := page.parent) is not None:
            lines.append(f"\n## {section.title}\n")
        lines.append(f"- [{page.title}]({page.file.src_uri})")
        target = site / page.file.src_uri
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page.markdown or "", encoding="utf-8")
        page = page.next_page
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return env


def linked(text: str, page: str) -> str:
    """A root document's text with its links leading to the site's pages; those to other files become plain text."""
    up = "../" * page.count("/")

    def target(match: re.Match[str]) -> str:
        words, path = match.groups()
        name, _, anchor = path.partition("#")
        if re.match(r"[a-z]+:", path) or not name:
            return match.group()
        place = COPIED.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else None)
        if name == PICTURE:
            place = name
        return f"[{words}]({up}{place}{'#' + anchor if anchor else ''})" if place else words

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", target, text)


def commands_page() -> str:
    """The help of every command, as `rwkv-peft COMMAND --help` prints it."""
    sys.path.insert(0, str(ROOT / "RWKV-PEFT"))
    from rwkv_peft.cli.commands import COMMANDS, usage

    parts = ["# Commands", f"```text\n{usage()}\n```"]
    for command in COMMANDS:
        parts.append(f"## {command.name}\n\n```text\n{help_of(command.name)}\n```")
    return "\n\n".join(parts) + "\n"


def help_of(command: str) -> str:
    from rwkv_peft.cli.commands import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return text.getvalue().strip()
