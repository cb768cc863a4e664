"""GGUF files for llama.cpp (architecture rwkv6), written through the optional `gguf` package.

llama.cpp wants the low-rank factors transposed, the five token-shift lerps stacked, and the other time
vectors flat; those stay float32, and the large matrices take the type asked for.
"""

import math
from contextlib import closing

import numpy as np
import torch

from .errors import UserError

TYPES = ("f32", "f16", "bf16", "q8_0")
LERPS = "wkvrg"  # the order in which llama.cpp stacks time_maa_*
Q8_BLOCK = 32  # q8_0 packs runs of this many values of a row
CONTEXT = 1 << 20  # a recurrent model has no limit; llama.cpp's own converter writes this


def write_gguf(path, base, config, kind="f16", vocabulary=None):
    """Write an RWKV-6 state dict as GGUF, tensor by tensor.

    base is a (mapped) state dict under official keys, config its ModelConfig; kind one of TYPES is the type of
    embedding, head and the eight matrices of each block (a matrix whose rows q8_0 cannot hold becomes f16);
    vocabulary is a list of bytes per token id (None for ids that stand for nothing), padded to the model's size.
    Raises UserError where the gguf package is missing or the model holds time states, which GGUF cannot.
    """
    gguf = import_gguf()
    states = [key for key in base if key.endswith("time_state")]
    if states:
        raise UserError(
            f"GGUF has no place for initial states, and the model holds {len(states)} (such as "
            f"{states[0]}); convert the model without them"
        )
    plan = list(_plan(base, config))
    with closing(gguf.GGUFWriter(str(path), "rwkv6")) as writer:
        _write_settings(writer, config, gguf.LlamaFileType[_file_type(kind)], vocabulary)
        types = {name: _type_of(gguf, name, shape, kind) for name, shape, _ in plan}
        for name, shape, _ in plan:
            # the package takes every type as the bytes that it is stored in
            stored = gguf.quants.quant_shape_to_byte_shape(shape, types[name])
            writer.add_tensor_info(name, stored, np.dtype("uint8"), math.prod(stored), types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, make in plan:
            writer.write_tensor_data(gguf.quants.quantize(make().float().contiguous().numpy(), types[name]))


def import_gguf():
    """The gguf package, or a UserError that says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("writing GGUF needs the gguf package: pip install gguf") from error
    return gguf


def _plan(base, config):
    """(GGUF name, shape, function that makes the float tensor) of each tensor, in order."""

    def entry(name, key, change=lambda tensor: tensor):
        return name, tuple(change(base[key].to("meta")).shape), lambda: change(base[key])

    def flat(tensor):
        return tensor.reshape(-1)

    yield entry("token_embd.weight", "emb.weight")
    for part in ("weight", "bias"):
        yield entry(f"token_embd_norm.{part}", f"blocks.0.ln0.{part}")
    for i in range(config.n_layer):
        att, ffn, block = f"blocks.{i}.att.", f"blocks.{i}.ffn.", f"blk.{i}."
        norms = (("attn_norm", f"blocks.{i}.ln1"), ("attn_norm_2", f"blocks.{i}.ln2"), ("time_mix_ln", f"{att}ln_x"))
        for norm, key in norms:
            for part in ("weight", "bias"):
                yield entry(f"{block}{norm}.{part}", f"{key}.{part}")
        yield entry(f"{block}time_mix_lerp_x.weight", f"{att}time_maa_x")
        keys = [f"{att}time_maa_{letter}" for letter in LERPS]
        yield (
            f"{block}time_mix_lerp_fused.weight",
            (len(keys), *base[keys[0]].shape),
            lambda keys=keys: torch.stack([base[key] for key in keys]),
        )  # (5, 1, 1, C)
        yield entry(f"{block}time_mix_w1.weight", f"{att}time_maa_w1", torch.t)
        yield entry(f"{block}time_mix_w2.weight", f"{att}time_maa_w2", lambda tensor: tensor.permute(0, 2, 1))
        yield entry(f"{block}time_mix_first.weight", f"{att}time_faaaa")
        yield entry(f"{block}time_mix_decay.weight", f"{att}time_decay", flat)
        yield entry(f"{block}time_mix_decay_w1.weight", f"{att}time_decay_w1", torch.t)
        yield entry(f"{block}time_mix_decay_w2.weight", f"{att}time_decay_w2", torch.t)
        for name in ("receptance", "key", "value", "gate", "output"):
            yield entry(f"{block}time_mix_{name}.weight", f"{att}{name}.weight")
        for letter in "kr":
            yield entry(f"{block}channel_mix_lerp_{letter}.weight", f"{ffn}time_maa_{letter}")
        for name in ("key", "receptance", "value"):
            yield entry(f"{block}channel_mix_{name}.weight", f"{ffn}{name}.weight")
    for part in ("weight", "bias"):
        yield entry(f"output_norm.{part}", f"ln_out.{part}")
    yield entry("output.weight", "head.weight")


def _is_matrix(name):
    return name in ("token_embd.weight", "output.weight") or name.endswith(
        tuple(f"_mix_{part}.weight" for part in ("receptance", "key", "value", "gate", "output"))
    )


def _type_of(gguf, name, shape, kind):
    if not _is_matrix(name):
        kind = "f32"
    elif kind == "q8_0" and shape[-1] % Q8_BLOCK:
        kind = "f16"
    return gguf.GGMLQuantizationType[kind.upper()]


def _file_type(kind):
    return "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"


def _write_settings(writer, config, file_type, vocabulary):
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rescale_every_n_layers(0)  # rescaling halves weights to suit float16 activations; 0 is exact
    writer.add_wkv_head_size(config.head_size)
    writer.add_time_mix_extra_dim(config.maa_rank)
    writer.add_time_decay_extra_dim(config.decay_rank)
    writer.add_feed_forward_length(config.dim_ffn)
    writer.add_head_count(0)  # none in the sense of attention
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("rwkv")
    tokens, types = [], []
    for token in range(config.vocab_size):
        content = vocabulary[token] if vocabulary is not None and token < len(vocabulary) else None
        # llama.cpp reads a token as the inside of a Python bytes literal
        text = "<s>" if token == 0 else f"[PAD{token}]" if content is None else repr(content)[2:-1]
        tokens.append(text.encode())
        types.append(3 if token == 0 else 5 if content is None else 1)  # control, unused, normal
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
