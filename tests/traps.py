"""A current folder that came with somebody's data: its modules would run if Python looked there first."""

MODULES = (
    *("argparse", "importlib", "json", "linecache", "multiprocessing", "ninja", "pathlib", "re", "runpy", "subprocess"),
    *("numpy", "rwkv", "rwkv_peft", "torch"),
)


def set_traps(folder):
    """Write the modules, each of which would make the folder `ran` and end its process; -> `ran`."""
    ran = folder / "ran"
    for name in MODULES:
        code = f"import os\nos.makedirs({str(ran)!r}, exist_ok=True)\nos._exit(99)\n"
        (folder / f"{name}.py").write_text(code)
    (folder / "matplotlibrc").write_bytes(b"axes.facecolor: red\nbackend: module://re\n\xff")  # ends the import
    return ran
