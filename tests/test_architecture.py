"""The import arrows between the package's parts, what an import costs, and that every setting is read."""

import ast
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from rwkv_peft import config

PACKAGE = Path(__file__).resolve().parents[1] / "RWKV-PEFT" / "rwkv_peft"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = (
    "deepspeed",
    "lightning",
    "transformers",
    "peft",
    "matplotlib",
    "bitsandbytes",
    "datasets",
    "wandb",
    "tensorboard",
    "accelerate",
    "trl",
)
# (part, the modules that make it, the parts that it may import); whatever an imported part may import is open too.
PARTS = (
    ("base", ("", "config", "errors", "cli", "memory"), ()),
    ("ops", ("ops",), ("base",)),
    ("model", ("model",), ("base", "ops")),
    ("adapters", ("adapters",), ("base", "ops")),
    (
        "checkpoint",
        (
            "checkpoint",
            "atomic",
            "pth",
            "pth_writer",
            "safetensors_reader",
            "safetensors_writer",
            "adapter_file",
            "foreign",
            "foreign_hf",
            "names",
        ),
        ("base",),
    ),
    ("data", ("data",), ("base",)),
    ("merge", ("merge", "merge_change", "merge_cli", "ahead"), ("adapters", "checkpoint")),
    ("check", ("check",), ("model", "adapters", "checkpoint", "verify")),
    ("convert", ("convert", "gguf_file"), ("checkpoint", "data")),
    ("verify", ("verify", "runtimes"), ("model", "convert")),
    ("generate", ("generate",), ("model", "checkpoint", "data", "merge")),
    ("evals", ("evals",), ("generate",)),
    ("hf", ("hf",), ("adapters", "checkpoint")),
    ("plots", ("plots",), ("base", "checkpoint")),
    ("doctor", ("doctor",), ("base", "ops")),
    ("training", ("training",), ("model", "adapters", "checkpoint", "data", "plots")),
)


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path):
    """rwkv_peft/ops/bone.py -> ("ops", "bone"); an __init__.py is its package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def part_of(module):
    """The part that a module path such as ("ops", "bone") belongs to."""
    top = module[0] if module else ""
    names = [name for name, modules, _ in PARTS if top in modules]
    assert names, f"rwkv_peft.{top} belongs to no part: name it in PARTS, with what it may import"
    return names[0]


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


def package_imports(path):
    """The package's modules that a file imports anywhere in it, as paths such as ("ops", "bone")."""
    here = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = here[: len(here) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
            yield from [module] if module else [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rwkv_peft":
            yield tuple(node.module.split(".")[1:]) or (node.names[0].name,)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "rwkv_peft":
                    yield tuple(alias.name.split(".")[1:])


def top_level(path):
    """The statements of a file that run when it is imported, those under `if` and `try` included."""
    waiting = list(tree(path).body)
    while waiting:
        node = waiting.pop()
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(module_of(path)) or "package")
def test_imports_follow_the_arrows(path):
    part = part_of(module_of(path))
    for module in package_imports(path):
        other = part_of(module)
        assert other in reachable(part), f"{path.name} ({part}) imports rwkv_peft.{'.'.join(module)} ({other})"


def test_the_arrows_have_no_circle():
    for name, _, imports in PARTS:
        assert all(name not in reachable(other) for other in imports)


def files_imported(path):
    """The package's files that a file imports anywhere in it, as modules of FILES; of a package and a name in it, the
    file of the name."""
    modules = {module_of(file) for file in FILES}
    here = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rwkv_peft":
            base = tuple(node.module.split(".")[1:])
        else:
            continue
        for alias in node.names:
            yield (*base, alias.name) if (*base, alias.name) in modules else base


def test_files_of_the_ops_import_each_other_without_a_circle():
    imports = {module_of(path): set(files_imported(path)) for path in FILES if module_of(path)[:1] == ("ops",)}
    while imports:
        free = [module for module, others in imports.items() if not others & set(imports)]
        assert free, f"these import each other in a circle, or wait for one: {sorted(map('.'.join, imports))}"
        for module in free:
            del imports[module]


def test_what_every_kernel_needs_knows_none_of_them():
    for path in FILES:
        if module_of(path)[:2] == ("ops", "native"):
            others = {module for module in files_imported(path) if module[:2] != ("ops", "native")}
            assert others == set(), f"{path.name} imports {others}"


def test_model_and_adapters_meet_in_the_run_and_its_check_alone():
    both = [
        module_of(path)
        for path in FILES
        if {"model", "adapters"} <= {part_of(module) for module in package_imports(path)}
    ]
    assert both == [("check",), ("training", "run")]


def test_heavy_packages_are_imported_by_the_files_whose_job_they_are():
    allowed = {("training", name) for name in ("batches", "callbacks", "lit", "strategy")}
    for path in FILES:
        module = module_of(path)
        assert not heavy_imports(path) or module in allowed or module[0] == "hf", f"{path}: {heavy_imports(path)}"


def test_importing_the_package_costs_torch_at_most():
    light = [
        ".".join(("rwkv_peft", *module_of(path)))
        for path in FILES
        if not heavy_imports(path) and module_of(path)[:1] != ("hf",)
    ]
    code = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        + "".join(f"import {name}\n" for name in light)
        + (f"print(*({{name.split('.')[0] for name in sys.modules}} & set({HEAVY!r})))")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_nothing_mutable_is_global():
    for path in FILES:
        for node in top_level(path):
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, (ast.Dict, ast.List, ast.Set)):
                names = [ast.unparse(target) for target in getattr(node, "targets", [getattr(node, "target", None)])]
                assert names == ["__all__"], f"{path}, line {node.lineno}: {names} is mutable; use a tuple"


def names_read(path):
    """Attributes read and plain strings in a file, flags such as "--lr_init" aside."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def settings():
    """(dataclass, field) of every settings dataclass."""
    classes = [value for value in vars(config).values() if is_dataclass(value)]
    return [(cls.__name__, field.name) for cls in classes for field in fields(cls)]


def test_every_setting_is_read_by_the_code_that_it_steers():
    flags = (("training", "flags"), ("training", "adapter_flags"))
    read = {name for path in FILES if module_of(path) not in flags for name in names_read(path)}
    unread = [f"{cls}.{name}" for cls, name in settings() if name not in read]
    assert unread == []


def test_every_flag_of_train_is_read():
    from rwkv_peft.training.flags import build_parser

    read = {
        name
        for file in ("flags.py", "adapter_flags.py", "legacy.py")
        for name in names_read(PACKAGE / "training" / file)
    }
    read |= {name for _, name in settings()}
    unread = [
        action.option_strings[0]
        for action in build_parser()._actions
        if action.dest not in read and action.dest != "help"
    ]
    assert unread == ["--model_version"]  # a claim with one possible value, checked by its choices
