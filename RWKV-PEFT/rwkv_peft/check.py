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
from .adapters.delta import RESIDUAL_VARIANTS
from .checkpoint import load_adapter_into, load_base, model_config_from_state, read_adapter, save_model
from .cli import Parser, alias
from .config import BONE_MODES, MODE_ALIASES, TRAIN_PARTS, AdapterConfig
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
        return cls(
            float((logits - reference).norm() / reference.norm()),
            float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
        )

    def __str__(self):
        return f"relative difference {self.relative:.1e}, same top token in {self.top_agreement:.0%}"


def model_logits(path, tokens, adapter=None, mode=None, init=None, alpha=None):
    """Logits (T, V) of the .pth at path over tokens (T,), in float32, with an adapter's layers where one is given;
    mode, init and alpha as in read_adapter."""
    state = load_base(path)
    with torch.device("meta"):
        model = RWKV6(model_config_from_state(state))
    model.load_state_dict(state, strict=True, assign=True)
    model.float()
    if adapter is not None:
        loaded = read_adapter(adapter, mode, state, init, alpha)
        metadata = loaded.metadata
        if metadata.quant != "none" or metadata.variant in RESIDUAL_VARIANTS:
            for name in loaded.modules():  # made of the weight as the training had it
                model.get_submodule(name).to(metadata.base_dtype() or state[f"{name}.weight"].dtype)
        inject(model, adapter_config(loaded), initial=loaded.tensors)
        model.float()
        load_adapter_into(model, loaded, adapter)
    with torch.inference_mode():
        return model(tokens[None])[0][0]


def adapter_config(adapter):
    """The AdapterConfig that gives an Adapter's layers their places and shapes again."""
    metadata = adapter.metadata
    if any(key.endswith(".time_state") for key in adapter.tensors):
        raise UserError(
            "time states are where a sequence starts, for which the model has no parameters, so they are not "
            "compared; python -m rwkv_peft.verify asks the runtimes for them"
        )
    method, mode = ("bone", {"mode": metadata.variant}) if metadata.variant in BONE_MODES else (metadata.variant, {})
    # files of other tools name single tensors here; a tensor is loaded whether or not it trains
    parts = tuple(part for part in metadata.train_parts if part in TRAIN_PARTS)
    targets = tuple(adapter.modules()) or tuple(metadata.targets)  # some files have not every layer's
    return AdapterConfig(
        method=method,
        rank=metadata.rank,
        mini_rank=metadata.mini_rank,
        alpha=metadata.scale * metadata.rank,
        targets=targets,
        train_parts=parts,
        quant=metadata.quant,
        **mode,
    )


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
    parser.add_argument(
        "--bone_mode",
        type=alias(MODE_ALIASES),
        choices=BONE_MODES,
        help="variant of a .bone file that does not tell it, as in merge_bone.py",
    )
    parser.add_argument("--lora_alpha", type=float, help="alpha of an RWKV-PEFT LoRA file")
    parser.add_argument("--lora_init", metavar="PTH", help="init_pissa.pth of an RWKV-PEFT PiSSA file")
    parser.add_argument("--merged", required=True, metavar="PTH")
    parser.add_argument("--tokens", type=int, default=64, help="length of the random token sequence")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: at least one is compared")
    config, base_config = (model_config_from_state(load_base(path)) for path in (args.merged, args.base_model))
    if config != base_config:
        raise UserError(
            f"{args.merged} and {args.base_model} differ in their dimensions, {config} and {base_config}, so that "
            "neither was made of the other; give the base of the merge"
        )
    tokens = torch.randint(config.vocab_size, (args.tokens,), generator=torch.Generator().manual_seed(0))
    merged = model_logits(args.merged, tokens)
    comparisons = (
        (
            "merged file, rwkv package and ours",
            Difference.between(runtime_logits(args.merged, tokens), merged),
            SAME_FILE,
        ),
        (
            "merged file and base with adapter on",
            Difference.between(
                merged,
                model_logits(
                    args.base_model, tokens, args.bone_checkpoint, args.bone_mode, args.lora_init, args.lora_alpha
                ),
            ),
            ROUNDED,
        ),
    )
    for text, difference, limit in comparisons:
        print(f"{text}: {difference}" + ("" if difference.relative <= limit else f", MORE THAN {limit:.0e}"))
    return int(not all(difference.relative <= limit for _, difference, limit in comparisons))  # NaN is below no limit


if __name__ == "__main__":
    exit_on_user_error(main)
