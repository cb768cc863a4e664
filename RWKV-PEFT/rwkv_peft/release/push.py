"""Push a run's adapter or model to the Hugging Face hub, with its card: `rwkv-peft push RUN NAME/REPO`.

HF_ENDPOINT names another hub, such as a mirror.
"""

from pathlib import Path
from typing import Any

from ..checkpoints.best import BEST, labelled, take
from ..cli.errors import UserError, summarize
from ..cli.names import ADAPTER, CARD, MERGED, MODEL, PICTURE, TUNED
from ..cli.parser import counted
from .card import card_of, is_own
from .flags import push_flags

NEWEST = (ADAPTER, MODEL, MERGED, TUNED)  # pushed of a run's folder, if they are there; their best if it is taken


def main(argv: list[str]) -> int:
    args = push_flags(argv)
    source = Path(args.source)
    paths = files_of(source, args.files)
    beside = [path for name in (CARD, PICTURE) if source.is_dir() and (path := source / name).is_file()]
    if source.is_dir() and (links := [str(path) for path in (*paths, *beside) if path.is_symlink()]):
        raise UserError(f"{', '.join(links)}: a link may lead to any file of yours; put a copy in its place")
    contents: dict[str, Path | bytes] = {path.name: path for path in (*paths, *beside)}
    card, first = source / CARD, paths[0]
    of_other = first.suffix in (".safetensors", ".pth") and CARD in contents and is_own(card)
    if CARD not in contents or (of_other and f"`{first.name}`" not in card.read_text("utf-8")):
        contents[CARD] = card_of(args.repo, paths).encode()
    for name, content in contents.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        told_size = f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"
        print(f"{'would push' if args.dry_run else 'pushes':<10} {name}, {told_size}")
    if not args.dry_run:
        print(f"pushed     {counted(len(contents), 'file')} to {push(args.repo, contents, args.private, args.message)}")
    return 0


def files_of(source: Path, names: list[str] | None) -> list[Path]:
    """The files to push: a file, or those named of a folder, else the newest of each kind, or the best ones if they
    are to be taken (checkpoints/best.py). Raises UserError."""
    if not source.is_dir():
        if names:
            raise UserError(f"--files {' '.join(names)} are files in a folder, and {source} is none; leave --files out")
        names, source = [source.name], source.parent
    paths = [source / name for name in names or NEWEST]
    if not names:
        if (found := take(source)).note:
            print(found.note)
            paths = [best if (best := labelled(path, BEST)).is_file() else path for path in paths]
        paths = [path for path in paths if path.is_file()]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError(f"{', '.join(missing)}: no such file; name an adapter, a model, or the folder of a run")
    if not paths:
        raise UserError(f"{source} holds none of {', '.join(NEWEST)}; name the folder of a run, or --files in it")
    return paths


def push(repo: str, contents: dict[str, Path | bytes], private: bool, message: str) -> str:
    """Make the repository if there is none, and commit {name in it: file or bytes} -> the commit's address. Raises
    UserError if the hub cannot be reached, or refuses."""
    import huggingface_hub as hub

    api = hub.HfApi()
    if hub.get_token() is None:
        raise UserError(f"this machine is not logged in to {api.endpoint}; run `hf auth login` first, or set HF_TOKEN")
    operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in contents.items()]
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        commit: Any = api.create_commit(repo, operations, commit_message=message)
    except Exception as error:  # its HTTP client's own, which change with its versions
        raise UserError(
            f"{repo} was not pushed to {api.endpoint}: {summarize(error)}; nothing was committed: mend that, and push "
            "again"
        ) from error
    return str(commit.commit_url)
