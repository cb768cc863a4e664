"""Does a merged model say in a foreign runtime what base plus adapter say in ours?

    python -m rwkv_peft.check --base_model base.pth --bone_checkpoint adapter.safetensors --merged merged.pth

Reads one random token sequence with base and adapter layers here, with the merged file here, and with the merged file
in the `rwkv` package, all in float32 on the CPU, and compares their logits. Needs memory for two float32 copies.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from .adapters import inject
from .checkpoint import load_adapter_into, load_base, model_config_from_state, read_adapter, save_model
from .cli import Parser
from .config import AdapterConfig
from .errors import UserError, exit_on_user_error
from .model import RWKV6
from .runtimes import rwkv_model

SAME_FILE = 1e-4  # relative difference allowed between two float32 programs that read the same weights
ROUNDED = 5e-2  # and between a merged file and the unmerged float32 sum that it rounds to its dtype


class Difference(NamedTuple):
    """How far logits (T, V) are from others: norm of the difference over norm, and the share of equal top tokens."""

    relative: float
    top_agreement: float

    @classmethod
    def between(cls, logits, reference):
        return cls(float((logits - reference).norm() / reference.norm()),
                   float((logits.argmax(-1) == reference.argmax(-1)).float().mean()))

    def __str__(self):
        return f"relative difference {self.relative:.1e}, same top token in {self.top_agreement:.0%}"


def model_logits(path, tokens, adapter=None):
    """Logits (T, V) of the .pth at path over tokens (T,), in float32, with an adapter's layers where one is given."""
    state = load_base(path)
    with torch.device("meta"):
        model = RWKV6(model_config_from_state(state))
    model.load_state_dict(state, strict=True, assign=True)
    model.float()
    if adapter is not None:
        loaded = read_adapter(adapter, base=state)
        inject(model, adapter_config(loaded))
        load_adapter_into(model, loaded, adapter)
    with torch.inference_mode():
        return model(tokens[None])[0][0]


def adapter_config(adapter):
    """The AdapterConfig that gives an Adapter's layers their places and shapes again."""
    metadata = adapter.metadata
    if metadata.variant not in ("bone", "bone-mini", "bat-in", "bat-out", "lora"):
        raise UserError(f"a {metadata.variant} adapter changes the base it was trained on, so it is not compared; "
                        "compare the merged model by its answers")
    method = "lora" if metadata.variant == "lora" else "bone"
    mode = {} if method == "lora" else {"mode": metadata.variant}
    return AdapterConfig(method=method, rank=metadata.rank, mini_rank=metadata.mini_rank,
                         alpha=metadata.scale * metadata.rank, targets=tuple(metadata.targets),
                         train_parts=tuple(metadata.train_parts), **mode)


def runtime_logits(path, tokens):
    """Logits (T, V) that the `rwkv` package computes in float32 for the .pth at path over tokens (T,).

    A float32 copy is read, because the package folds blocks.0.ln0 into the embedding in the file's own dtype.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "float32.pth"
        save_model(copy, {key: tensor.float() for key, tensor in load_base(path).items()})
        runtime = rwkv_model(copy)
    with torch.inference_mode():
        return runtime.forward(tokens.tolist(), None, full_output=True)[0].float()


def main(argv):
    """Print the comparisons; 0 where all logits agree, else 1."""
    parser = Parser(prog="python -m rwkv_peft.check", description="Compare a merged model with base plus adapter.")
    parser.add_argument("--base_model", required=True, metavar="PTH")
    parser.add_argument("--bone_checkpoint", required=True, metavar="FILE", help="the adapter")
    parser.add_argument("--merged", required=True, metavar="PTH")
    parser.add_argument("--tokens", type=int, default=64, help="length of the random token sequence")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: at least one is compared")
    vocab_size = load_base(args.merged)["emb.weight"].shape[0]
    tokens = torch.randint(vocab_size, (args.tokens,), generator=torch.Generator().manual_seed(0))
    merged = model_logits(args.merged, tokens)
    comparisons = (
        ("merged file, rwkv package and ours", Difference.between(runtime_logits(args.merged, tokens), merged), SAME_FILE),
        ("merged file and base with adapter on",
         Difference.between(merged, model_logits(args.base_model, tokens, args.bone_checkpoint)), ROUNDED),
    )
    for text, difference, limit in comparisons:
        print(f"{text}: {difference}" + ("" if difference.relative <= limit else f", MORE THAN {limit:.0e}"))
    return int(any(difference.relative > limit for _, difference, limit in comparisons))


if __name__ == "__main__":
    exit_on_user_error(main)
