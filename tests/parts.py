"""The package's parts, and which of them each may import."""

BASE = "children config errors numeric streams refusals rules cli names tables memory installing gpus".split()
FLAGS = ("files/source_flags", "release/flags", "generate/flags", "generate/settings", "evals/flags", "serve/flags")
# (part, the modules that make it, the parts that it may import); whatever an imported part may import is open too. A
# module stands for what is below it, unless that is named itself.
PARTS = (
    ("base", ("", *BASE), ()),
    ("flags", FLAGS, ("base",)),
    ("native", ("ops/native",), ("base",)),  # builds for kernels of which it knows none
    ("ops", ("ops",), ("native",)),
    ("objectives", ("objectives",), ("base", "ops")),  # no engine, and no model but the pass that a step hands them
    ("models", ("models",), ("base", "ops")),
    ("adapters", ("adapters",), ("base", "ops")),
    ("containers", ("files",), ("flags",)),
    ("bases", ("files/base",), ("containers", "models", "adapters")),
    (
        "adapter files",
        (
            *("files/adapter_file", "files/adapters", "files/rwkv_peft_file", "files/peft_folder", "files/state_file"),
            "files/lightning_folder",
        ),
        ("bases", "containers", "models", "adapters"),
    ),
    ("data", ("data",), ("containers",)),
    ("merge", ("release",), ("bases", "adapter files")),
    (
        "convert",
        (
            *("release/convert", "release/formats", "release/gguf", "release/lora", "release/miss"),
            *("release/vocabulary", "release/chat_template", "release/world_json"),
        ),
        ("bases", "adapter files", "data"),
    ),
    ("check", ("release/check", "release/verify", "release/runtimes"), ("convert", "merge")),
    ("generate", ("generate",), ("merge", "data")),
    ("gate", ("serve/gate", "serve/web"), ("base",)),  # of any server
    ("serve", ("serve",), ("generate", "gate")),
    ("python", ("api",), ("generate", "check")),  # what `import rwkv_peft as rp` offers
    ("evals", ("evals",), ("generate",)),
    ("rewards", ("rewards",), ("evals",)),
    ("hf", ("hf",), ("generate", "convert")),
    ("plots", ("plots", "comparison"), ("containers", "objectives")),
    ("inspect", ("release/contents", "release/heat", "release/card", "release/push"), ("convert", "merge", "plots")),
    ("doctor", ("doctor",), ("models", "containers", "inspect")),
    ("optimizers", ("training/optimizers",), ("native", "ops")),  # DeepSpeed's Adam is compiled on first use
    ("step", ("training/step",), ("optimizers", "bases", "adapter files", "data", "plots", "merge", "objectives")),
    ("saving", ("training/saving",), ("step",)),
    ("train flags", ("training/flags",), ("saving",)),
    ("ranks", ("training/ranks",), ("train flags",)),
    ("measuring", ("training/measuring", "training/inputs"), ("ranks", "evals")),
    ("drawing", ("training/drawing",), ("step", "generate", "rewards")),
    ("engine", ("training/engine",), ("measuring", "drawing", "inspect")),
    ("training", ("training",), ("engine",)),
    (
        "run",
        ("training/run", "training/measuring/exams", "training/rank"),
        ("training", "evals", "rewards"),
    ),  # they give the run what it asks
    ("plan", ("plan",), ("training",)),
    ("page", ("ui",), ("train flags", "data", "gate")),  # it starts the commands that compute
    ("page's check", ("ui/check",), ("run", "plan")),  # which it starts, too
    ("compare", ("compare",), ("run",)),
    ("study", ("study",), ("run",)),
    ("commands", ("commands", "__main__"), ("flags",)),  # it imports a command when that is called, by its name
)
