"""From a family's C++ source to its loaded library."""

from .build import Unit, build_library, kept_library
from .compilers import find_compiler
from .errors import BuildError
from .library import load
from .sources import included_files, source_directory

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp")


def cpu_library(name, source, flags, functions, headers=()):
    """The library `name` of `source`, a path below cpu/, compiled with FLAGS and `flags`, its `functions` declared as
    `load` takes them; built anew also where one of `headers` changes. One that was built earlier serves where no
    compiler works. Raises BuildError where there is neither."""
    root = source_directory("cpu")
    source = root / source
    headers = [*included_files(source, root), *headers]

    def recipe(compiler):
        return name, [Unit(source, (compiler, *FLAGS, *flags, f"-I{root}"))], (compiler, "-shared", "-fopenmp"), headers

    try:
        library = build_library(*recipe(find_compiler()))
    except BuildError:
        library = kept_library(*recipe(""))
        if library is None:
            raise
    return load(library, *functions)
