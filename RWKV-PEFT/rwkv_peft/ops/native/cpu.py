"""From a family's C++ source to its loaded library."""

from .build import Unit, build_library
from .compilers import find_compiler
from .library import load
from .sources import included_files, source_directory

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp")


def cpu_library(name, source, flags, functions, headers=()):
    """The library `name` of `source`, a path below cpu/, compiled with FLAGS and `flags`, its `functions` declared as
    `load` takes them; built anew also where one of `headers` changes. Raises BuildError where that fails."""
    root = source_directory("cpu")
    compiler, source = find_compiler(), root / source
    unit = Unit(source, (compiler, *FLAGS, *flags, f"-I{root}"))
    headers = [*included_files(source, root), *headers]
    return load(build_library(name, [unit], (compiler, "-shared", "-fopenmp"), headers), *functions)
