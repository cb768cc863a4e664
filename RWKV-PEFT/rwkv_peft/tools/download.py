"""`rwkv-peft download`: an official base of the Hugging Face hub or a mirror, as a file in a folder.

rwkv-peft download 1.5b --mirror https://hf-mirror.com

A download that was stopped goes on where it was. The repository changes each month; docs/start/models.md says which of
its files to take.
"""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..checkpoints.atomic import require_room
from ..checkpoints.pth_header import read_header
from ..cli.errors import UserError, summarize
from ..cli.parser import Parser

REPOSITORY = "BlinkDL/rwkv7-g1"
OFFICIAL = (  # the newest of each size
    "rwkv7-g1d-0.1b-20260129-ctx8192.pth",
    "rwkv7-g1d-0.4b-20260210-ctx8192.pth",
    "rwkv7-g1k-1.5b-20260930-ctx25600.pth",
    "rwkv7-g1k-2.9b-20260930-ctx25600.pth",
    "rwkv7-g1k-7.2b-20260930-ctx25600.pth",
    "rwkv7-g1k-13.3b-20260930-ctx25600.pth",
)
SIZES = {name.split("-")[2]: name for name in OFFICIAL}  # by "1.5b"
MIRROR = "https://hf-mirror.com"


def main(argv: list[str]) -> int:
    """Download a base unless it is there -> the exit code. Raises UserError for a disk without room for it, and for a
    hub that cannot be reached or has no such file."""
    args = download_flags(argv)
    path = Path(args.folder) / args.name
    if path.exists():
        print(f"{path} is there already")
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    fetch(args.repository, path, args.mirror)
    if read_header(str(path)) is None:
        raise UserError(f"{path} is no model that PyTorch wrote; delete it, and download another")
    print(f"downloaded {path}")
    return 0


def download_flags(argv: list[str]) -> argparse.Namespace:
    """Parse the flags; name becomes a file's name. Raises UserError."""
    parser = Parser(
        prog="rwkv-peft download",
        description="Download an official base into a folder. The same command goes on with a download that was "
        "stopped.",
    )
    parser.add_argument(
        "name", metavar="SIZE|FILE", help=f"{', '.join(SIZES)}: the newest official base of this size; or a file's name"
    )
    parser.add_argument(
        "folder", nargs="?", default=".", metavar="FOLDER", help="where to put it (default: the current one)"
    )
    parser.add_argument(
        "--repository", default=REPOSITORY, metavar="NAME", help="the repository of the hub (default: %(default)s)"
    )
    parser.add_argument(
        "--mirror", default=None, metavar="URL", help=f"a mirror of the Hugging Face hub, such as {MIRROR}"
    )
    args = parser.parse_args(argv)
    args.name = SIZES.get(args.name.lower(), args.name)
    if not args.name.endswith(".pth") or Path(args.name).name != args.name:
        raise UserError(f"{args.name} is neither a size ({', '.join(SIZES)}) nor the name of a .pth file")
    if args.mirror and not args.mirror.startswith(("https://", "http://")):
        raise UserError(f"--mirror {args.mirror} is no address; write it as {MIRROR}")
    return args


def fetch(repository: str, path: Path, mirror: str | None) -> None:
    """Download a repository's file of the name of `path` to it."""
    import huggingface_hub as hub

    place: dict[str, Any] = {"repo_id": repository, "filename": path.name, "local_dir": path.parent, "endpoint": mirror}
    try:
        described: Any = hub.hf_hub_download(**place, dry_run=True)
        require_room("FOLDER", path.parent, described.file_size, path.name)
        hub.hf_hub_download(**place, tqdm_class=DownloadBar)
    except UserError:
        raise
    except Exception as error:  # its HTTP client's own, which change with its versions
        where = mirror or hub.constants.ENDPOINT
        raise UserError(
            f"{repository}/{path.name} was not downloaded from {where}: {summarize(error)}; the same command goes on "
            f"where it was, --mirror {MIRROR} takes another place, and docs/start/models.md has lines without it"
        ) from error


class DownloadBar(tqdm):
    """A bar that is also printed into a file, where the page reads it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        form = "{percentage:.0f} %  {n_fmt}B of {total_fmt}B  {rate_fmt}  {remaining} left"
        super().__init__(*args, **options | {"bar_format": form, "mininterval": 1.0, "disable": False})
