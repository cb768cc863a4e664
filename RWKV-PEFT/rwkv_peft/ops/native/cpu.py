"""From a family's C++ source to its loaded library."""

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path

from .build import Unit, build_library, kept_library
from .compilers import find_compiler
from .errors import BuildError
from .library import Declaration, load
from .sources import included_files, source_directory

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp")


def cpu_library(
    name: str, source: str, flags: Sequence[str], functions: Iterable[Declaration], headers: Sequence[str | Path] = ()
) -> ctypes.CDLL:
    """The library `name` of `source`, a path below cpu/, compiled with FLAGS and `flags`, its `functions` declared as
    `load` takes them; built anew also where one of `headers` changes. One that was built earlier serves where no
    compiler works. Raises BuildError where there is neither."""
    root = source_directory("cpu")
    file = root / source
    headers = [*included_files(file, root), *headers]

    def recipe(compiler: str) -> tuple[str, list[Unit], tuple[str, ...], list[str | Path]]:
        return name, [Unit(file, (compiler, *FLAGS, *flags, f"-I{root}"))], (compiler, "-shared", "-fopenmp"), headers

    try:
        library = build_library(*recipe(find_compiler()))
    except BuildError:
        kept = kept_library(*recipe(""))
        if kept is None:
            raise
        library = kept
    return load(library, *functions)
