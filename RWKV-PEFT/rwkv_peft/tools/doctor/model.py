"""Say in short what a file holds, and which commands suit it: `rwkv-peft doctor --model FILE`; `rwkv-peft inspect` has
all that is known of it."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

from ...checkpoints.adapters import AdapterSource, product_of_run
from ...checkpoints.base import Base
from ...data.recorded import flags_beside
from ...release.inspect import ADAPTER, MODEL, SESSION, STATES, Contents, contents_of, formatted

SHORT = ("kind", "dimensions", "method", "trained whole", "base", "parameters", "dtype", "states", "keys", "not read")
FOREIGN_FORMAT = "a model in another tool's format"
AI00, LLAMA_CPP = "bring it to Ai00", "bring it to llama.cpp"
# what a file holds -> (a purpose, the command); {} is the file
COMMANDS = MappingProxyType(
    {
        MODEL: (
            ("see what fits", "rwkv-peft plan --load_model {} --ctx_len 1024"),
            ("train on rows", "rwkv-peft train --load_model {} --data_file rows.jsonl --data_type sft --proj_dir out"),
            ("talk to it", "rwkv-peft generate --model {} --chat"),
            ("score it on rows", "rwkv-peft eval jsonl --model {} --data rows.jsonl"),
            (AI00, "rwkv-peft convert {} model.st"),
            (LLAMA_CPP, "rwkv-peft convert {} model.gguf"),
        ),
        FOREIGN_FORMAT: (("make it a base", "rwkv-peft convert {} base.pth"),),
        ADAPTER: (
            ("talk to it", "rwkv-peft generate --model base.pth --adapter {} --chat"),
            ("make one model", "rwkv-peft merge --base_model base.pth --peft_checkpoint {} --output merged.pth"),
        ),
        STATES: (
            ("talk to it", "rwkv-peft generate --model base.pth --state {} --chat"),
            ("make one model", "rwkv-peft merge --base_model base.pth --state_checkpoint {} --output merged.pth"),
            (AI00, "rwkv-peft convert {} state.st"),
        ),
        SESSION: (("go on talking", "rwkv-peft generate --model base.pth --state {} --chat"),),
    }
)


def report(path: str) -> int:
    """Print what a file or folder holds, and the commands -> 0, or 1 if nothing here reads it. Raises UserError."""
    contents = contents_of(AdapterSource(path))
    print(formatted(line for line in contents.lines if line[0] in SHORT))
    commands = list(suited(path, contents))
    if not commands:
        print("\nno command of rwkv-peft takes it")
        return 1
    print(f"\n{formatted(commands)}")
    return 0


def suited(path: str, contents: Contents) -> Iterator[tuple[str, str]]:
    """Yield (purpose, command) for a file or folder with the Contents of one of COMMANDS, or unknown ones."""
    what, held = contents.what, contents.holds
    only_pth = isinstance(held, Base) and not held.family.gguf_architecture
    if what == MODEL and product_of_run(path).suffix != ".pth":
        what = FOREIGN_FORMAT
    for purpose, command in COMMANDS.get(what, ()):
        if not (only_pth and purpose in (AI00, LLAMA_CPP)):
            yield purpose, command.format(shlex.quote(str(Path(path)))).replace("--chat", flags_beside(path))
