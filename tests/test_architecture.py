"""The import arrows between the package's parts, what an import costs, and that every setting is read."""

import ast
import functools
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import rwkv_peft
from parts import PARTS
from rwkv_peft import config
from rwkv_peft.config import AdapterConfig, DataConfig, TrainConfig
from rwkv_peft.config.adapter import JSON_FLAGS, PEFT_FLAG
from rwkv_peft.config.setting import flag_of
from rwkv_peft.models.rwkv6.keys import RWKV6Config
from rwkv_peft.objectives import OBJECTIVES
from rwkv_peft.training.flags.parser import DIMENSIONS, build_parser

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "RWKV-PEFT" / "rwkv_peft"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = (
    *"deepspeed lightning transformers peft matplotlib bitsandbytes datasets".split(),
    *"wandb trackio swanlab tensorboard accelerate".split(),
    *"trl lm_eval fastapi starlette uvicorn pydantic".split(),
)
HEAVY_PARTS = (("hf",), ("inference", "serve"), ("tools", "ui"))  # but for their flags


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path):
    """rwkv_peft/ops/bone.py -> ("ops", "bone"); an __init__.py is its package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def part_of(module):
    """The part of a module path such as ("ops", "cpu"): that with the longest matching path."""
    names = {path: name for name, modules, _ in PARTS for path in modules}
    paths = ["/".join(module[:length]) for length in range(len(module), 0, -1)] or [""]
    found = [names[path] for path in paths if path in names]
    assert found, f"rwkv_peft.{'.'.join(module)} belongs to no part: name it in PARTS, with what it may import"
    return found[0]


def reachable(part):
    """The parts that `part` may import, itself included."""
    direct = {name: imports for name, _, imports in PARTS}
    found, waiting = set(), [part]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += direct[name]
    return found


MODULES = {module_of(path): path for path in FILES}


def package_imports(path):
    """The package's modules that a file imports anywhere in it, functions included, as paths such as ("ops", "cpu").
    The package itself names for type checkers what it imports at first use."""
    here = path.relative_to(PACKAGE).parent.parts
    for node in top_level(path, typing=False) if module_of(path) == () else ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = here[: len(here) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rwkv_peft":
            module = tuple(node.module.split(".")[1:])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "rwkv_peft":
                    yield tuple(alias.name.split(".")[1:])
            continue
        else:
            continue
        for alias in node.names:  # a name is a module of its own, or stands in one
            yield (*module, alias.name) if (*module, alias.name) in MODULES else module


def top_level(path, typing=True):
    """The statements of a file that run when it is imported, those under `if` and `try` included; without `typing`, not
    those under `if TYPE_CHECKING`."""
    waiting = list(tree(path).body)
    while waiting:
        node = waiting.pop()
        if not typing and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        waiting += [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler))
            and isinstance(child, (ast.stmt, ast.ExceptHandler))
        ]


def heavy_imports(path):
    """The heavy packages that importing a file imports."""
    found = set()
    for node in top_level(path):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found & set(HEAVY)


def test_imports_follow_the_arrows():
    parts = {module: part_of(module) for module in MODULES}
    allowed = {part: reachable(part) for part in set(parts.values())}
    for module, path in MODULES.items():
        wrong = [(other, parts[other]) for other in package_imports(path) if parts[other] not in allowed[parts[module]]]
        assert wrong == [], f"{path} ({parts[module]}) imports {wrong}"


def test_the_arrows_have_no_circle():
    for name, _, imports in PARTS:
        assert all(name not in reachable(other) for other in imports)


def test_no_file_imports_itself_by_way_of_others():
    imports = {module: set(package_imports(path)) - {module} for module, path in MODULES.items()}
    done = set()

    def visit(module, way):
        assert module not in way, " -> ".join(".".join(step) for step in (*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(imports[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in imports:
        visit(module, ())


def printed(*lines):
    """The lines that a Python without anything imported prints."""
    code = "\n".join((f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})", *lines))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_package_offers_names_without_importing_them():
    loaded = "print('torch' in sys.modules, 'numpy' in sys.modules, set(rp.__all__) <= set(dir(rp)))"
    names = "print(*(getattr(rp, name).__name__ for name in rp.__all__))"
    assert printed("import rwkv_peft as rp", loaded, names) == ["False False True", " ".join(rwkv_peft.__all__)]


def test_processes_that_start_often_do_without_torch():
    many = "import rwkv_peft.data.preprocess, rwkv_peft.rewards.child, rwkv_peft.tools.ui.preview"
    assert printed(many, "print('torch' in sys.modules)") == ["False"]


def test_adapters_are_put_into_models_by_few_files():
    imported = re.compile(r"inject import .*\binject\b")
    injecting = [".".join(module) for module, path in MODULES.items() if imported.search(path.read_text())]
    assert injecting == ["api.adapters", "inference.speakers", "release.check", "training.model"]


def test_heavy_packages_are_imported_by_the_files_whose_job_they_are():
    allowed = {("training", "zero")}
    allowed |= {("evals", "harness"), *(("inference", "serve", name) for name in ("app", "requests", "web"))}
    allowed |= {("tools", "ui", "app")}
    for path in FILES:
        module = module_of(path)
        assert not heavy_imports(path) or module in allowed or module[0] == "hf", f"{path}: {heavy_imports(path)}"


def test_importing_the_package_costs_torch_at_most():
    light = [
        ".".join(("rwkv_peft", *module_of(path)))
        for path in FILES
        if not heavy_imports(path)
        and (path.stem == "flags" or not {module_of(path)[:1], module_of(path)[:2]} & {*HEAVY_PARTS})
    ]
    heavy = f"print(*({{name.split('.')[0] for name in sys.modules}} & set({HEAVY!r})))"
    assert printed(*(f"import {name}" for name in light), heavy) == [""]


def test_nothing_mutable_is_global():
    for path in FILES:
        for node in top_level(path):
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, (ast.Dict, ast.List, ast.Set)):
                names = [ast.unparse(target) for target in getattr(node, "targets", [getattr(node, "target", None)])]
                assert names == ["__all__"], f"{path}, line {node.lineno}: {names} is mutable; use a tuple"


MOST_LINES = 600


def test_no_file_is_long():
    for folder in ("RWKV-PEFT/rwkv_peft", "tests", "benchmarks", "demo", "cpu", "cuda", "scripts"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".sh"):
                count = path.read_text(encoding="utf-8").count("\n")
                assert count <= MOST_LINES, f"{path} has {count} lines; one file, one idea"


MOST_ARGUMENTS = 8
BY_LETTER = ("wkv7",)  # takes the letters of its paper, one by one


@pytest.mark.parametrize(
    "folder", [PACKAGE, *(ROOT / name for name in ("tests", "benchmarks", "demo"))], ids=lambda folder: folder.name
)
def test_no_function_takes_many_arguments(folder):
    for path in folder.rglob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in BY_LETTER:
                arguments = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len([name for name in arguments if name not in ("self", "cls", "ctx")])
                assert count <= MOST_ARGUMENTS, f"{path}, line {node.lineno}: {node.name} takes {count}: {arguments}"


def names_read(path):
    """Attributes read and plain strings in a file, flags such as "--lr_init" aside."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def settings():
    """(dataclass, field) of every settings dataclass."""
    classes = [value for value in vars(config).values() if is_dataclass(value)] + [RWKV6Config, *OBJECTIVES.values()]
    return [(cls.__name__, field.name) for cls in classes for field in fields(cls)]


def test_every_setting_is_read_by_the_code_that_it_steers():
    flags = [("training", "flags", name) for name in ("request", "adapter", "parser")]
    read = {
        name
        for path in FILES
        if module_of(path) not in flags and module_of(path)[:1] != ("config",)
        for name in names_read(path)
    }
    unread = [f"{cls}.{name}" for cls, name in settings() if name not in read]
    assert unread == []


def test_every_flag_of_train_is_read():
    own = ("request.py", "adapter.py", "checks.py", "legacy.py", "../run.py")
    read = {name for file in own for name in names_read(PACKAGE / "training" / "flags" / file)}
    settings = (AdapterConfig, DataConfig, TrainConfig, *OBJECTIVES.values())
    read |= {flag_of(field) for cls in settings for field in fields(cls)}
    read |= set(dict(DIMENSIONS)) | {flag.name for flag in JSON_FLAGS} | {PEFT_FLAG}
    unread = [
        action.option_strings[0]
        for action in build_parser()._actions
        if action.dest not in read and action.dest != "help"
    ]
    assert unread == []


# the same thing for each generation or library
MIRRORED = {"Block", "TimeMix", "ChannelMix", "Products", "RWKV6Config", "RWKV7Config"}


def test_a_class_name_stands_for_one_class():
    names = [node.name for path in FILES for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    assert {name for name in names if names.count(name) > 1} == MIRRORED


def test_a_file_of_tests_has_a_name_of_its_own():
    """pytest collects no two of one name in folders that are no packages."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in sorted({*names}) if names.count(name) > 1] == []
