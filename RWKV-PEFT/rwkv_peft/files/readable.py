"""Whether a file that a user names can be read, before anything is: what is not there and what may not be read are two
things."""

import os
from pathlib import Path

from ..errors import UserError

SHOWN = 5  # files of a folder that a message names


def require_readable(path: str | Path, missing: str, again: bool = False) -> Path:
    """`path` as a Path to a file that opens for reading. Raises UserError: with the text `missing` where nothing is
    there, for a folder, for what exists and may not be read, and for a pipe or device that is to be read `again`."""
    path = Path(path)
    try:
        if os.path.isfile(path):  # opening a pipe would wait for its other end
            open(path, "rb").close()
        else:
            os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: {meant}" if (meant := home_meant(path)) else missing) from None
    except OSError as error:
        raise UserError(
            f"{path} exists, and may not be read ({os.strerror(error.errno or 0).lower()}); give yourself the "
            "permission, or copy it"
        ) from error
    if path.is_dir():
        raise UserError(f"{path} is a folder, where a file is expected{choice_in(path)}")
    if again and not path.is_file():
        raise UserError(
            f"{path} is a pipe or a device, which cannot be read twice; write it into a file, and give that"
        )
    return path


def home_meant(path: str | Path) -> str:
    """What to say of a path whose ~ no shell has replaced, as behind a flag's = or in quotes; "" of any other."""
    meant = os.path.expanduser(path)
    if meant == str(path) or os.path.lexists(Path(path).parts[0]):
        return ""
    return f"a shell reads ~ as the home folder where a word begins with it, and left it as it is here; give {meant}"


def choice_in(folder: str | Path, *endings: str) -> str:
    """The end of a message about a folder that was given where a file is due: "; give one of …", the first files in it
    whose names end so (without endings: all), or "" where there is none or the folder may not be read."""
    try:
        found = sorted(str(path) for path in Path(folder).iterdir() if path.is_file())
    except OSError:
        return ""
    found = [name for name in found if not endings or name.endswith(endings)]
    more = ", …" if len(found) > SHOWN else ""
    return f"; give {'one of ' * (len(found) > 1)}{', '.join(found[:SHOWN])}{more}" if found else ""
