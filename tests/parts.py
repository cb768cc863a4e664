"""The package's parts, and which of them each may import."""

BASE = "children config cli memory gpus system".split()
FLAGS = ["checkpoints/source_flags", *(f"{room}/flags" for room in "release inference evals inference/serve".split())]
FLAGS += ["inference/settings", "release/probe"]
# (part, the modules that make it, the parts that it may import); whatever an imported part may import is open too. A
# module stands for what is below it, unless that is named itself.
PARTS = (
    ("base", ("", *BASE, "tools"), ()),
    ("flags", FLAGS, ("base",)),
    ("native", ("ops/native",), ("base",)),  # builds for kernels of which it knows none
    ("ops", ("ops",), ("native",)),
    ("objectives", ("objectives",), ("base", "ops")),  # no engine, and no model but the pass that a step hands them
    ("models", ("models",), ("base", "ops")),
    ("adapters", ("adapters",), ("base", "ops")),
    ("containers", ("checkpoints",), ("flags",)),
    ("bases", ("checkpoints/base", "checkpoints/hf_folder"), ("containers", "models", "adapters")),
    (
        "adapter files",
        (
            *("checkpoints/adapter_file", "checkpoints/adapters", "checkpoints/rwkv_peft_file"),
            *("checkpoints/adapter_folders", "checkpoints/state_file"),
        ),
        ("bases", "containers", "models", "adapters"),
    ),
    ("data", ("data",), ("containers",)),
    ("merge", ("release",), ("bases", "adapter files")),
    ("convert", ("release/convert", "release/formats", "release/lora", "release/vocabulary"), ("merge", "data")),
    ("check", ("release/check", "release/runtimes"), ("convert", "merge")),
    ("environments", ("environments",), ("data",)),
    ("inference", ("inference",), ("merge", "data", "environments")),
    ("web", ("inference/serve/web",), ("base",)),  # of any server
    ("inference/serve", ("inference/serve",), ("inference", "web")),
    ("evals", ("evals",), ("inference", "plots")),
    ("prove", ("release/prove", "release/merge_command"), ("evals",)),
    ("rewards", ("rewards",), ("evals", "environments")),
    ("hf", ("hf",), ("inference", "convert")),
    ("plots", ("plots", "tools/plot"), ("containers", "objectives")),
    ("inspect", ("release/inspect", "release/card", "release/push"), ("convert", "merge")),
    ("tools/doctor", ("tools/doctor",), ("models", "containers", "inspect")),
    ("optimizers", ("training/optimizers",), ("native", "ops")),  # DeepSpeed's Adam is compiled on first use
    ("step", ("training/step",), ("optimizers", "bases", "adapter files", "data", "plots", "merge", "objectives")),
    (
        "run facts",
        ("training/saving/checkpoints", "training/saving/optimizer_state", "training/ranks/world", "training/rates"),
        ("step",),
    ),
    ("engine", ("training/engine", "training/zero"), ("run facts",)),
    ("saving", ("training/saving",), ("engine",)),
    ("train flags", ("training/flags",), ("saving",)),
    ("ranks", ("training/ranks",), ("measuring",)),
    ("estimate", ("training/estimate",), ("objectives", "models")),
    (
        "measuring",
        ("training/measuring", "training/learned", "training/inputs", "training/batch_size", "training/bounding"),
        ("train flags", "estimate", "evals"),
    ),
    ("rollouts", ("training/rollout", "training/turns"), ("engine", "inference", "rewards")),
    ("training", ("training",), ("measuring", "rollouts", "inspect")),
    ("run", ("training/run",), ("training", "ranks", "evals", "rewards")),
    ("python", ("api",), ("run", "check")),  # what `import rwkv_peft as rp` offers
    ("tools/plan", ("tools/plan",), ("training", "estimate")),
    ("demo", ("tools/demo", "tools/download"), ("containers",)),
    ("page", ("tools/ui",), ("tools/plan", "data", "web", "demo")),  # it starts the commands that compute
    ("page's check", ("tools/ui/check",), ("run", "tools/plan")),  # which it starts, too
    ("tools/study", ("tools/study",), ("run",)),
    ("tools/learn", ("tools/learn",), ("python",)),
    ("cli/commands", ("cli/commands", "__main__"), ("flags",)),  # it imports a command when that is called, by its name
)
