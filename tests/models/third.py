"""A third generation in one file, as a folder of models/ would hold it: linear attention with a decay for each head, a
layer's state of two fields, and a feed-forward that an embedding of the tokens gates, as RWKV-7's deep embeddings do.

    python tests/models/third.py COMMAND …      is rwkv-peft COMMAND …, which knows it
"""

import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from rwkv_peft import models
from rwkv_peft.cli import commands, names, tables
from rwkv_peft.config import ModelConfig
from rwkv_peft.models.family import Family
from rwkv_peft.models.layout import WKV, count_layers, wkv_shape
from rwkv_peft.models.parts import LanguageModel, Recurrent, Table, count_sequences, init_around_blocks
from rwkv_peft.models.state import is_time_state
from rwkv_peft.ops.mix import last_token, lerp

TARGETS = ("att.q", "att.k", "att.v", "att.out", "ffn.up", "ffn.down")


class ThirdState(NamedTuple):
    """wkv (B, H, N value, N key), and the last input of the time mix (B, C)."""

    wkv: torch.Tensor
    last: torch.Tensor

    @staticmethod
    def keys():
        return WKV, "att.last"

    @staticmethod
    def shapes(config):
        return wkv_shape(config), (config.n_embd,)


@dataclass(frozen=True)
class ThirdConfig(ModelConfig):
    version, layer_state = "x999", ThirdState


def recurrence(q, k, v, decay, state):
    """q k v (B, T, H, N), decay (H, 1, 1), state (B, H, N, N) -> y (B, T, H, N), state."""
    outputs = []
    for t in range(q.shape[1]):
        state = decay * state + v[:, t, :, :, None] * k[:, t, :, None, :]
        outputs.append((state @ q[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, 1), state


class TimeMix(Recurrent):
    rows_are_keys = False

    def __init__(self, config):
        super().__init__()
        C, self.heads = config.n_embd, (config.n_head, config.head_size)
        self.amount, self.decay = nn.Parameter(torch.empty(1, C)), nn.Parameter(torch.empty(config.n_head))
        self.q, self.k, self.v, self.out = (nn.Linear(C, C, bias=False) for _ in range(4))

    def forward(self, x, state, cu_seqlens):
        """x (B, T, C) -> (B, T, C), ThirdState."""
        (mixed,) = lerp(x, None if state is None else state.last, self.amount, cu_seqlens=cu_seqlens)
        q, k, v = (layer(mixed).unflatten(2, self.heads).float() for layer in (self.q, self.k, self.v))
        sequences = count_sequences(x, cu_seqlens)
        wkv = self.begun(None if state is None else state.wkv, sequences)
        if wkv is None:
            wkv = q.new_zeros(sequences, *self.heads, self.heads[1])
        decay = torch.sigmoid(self.decay.float()).view(-1, 1, 1)
        if cu_seqlens is None:
            y, wkv = recurrence(q, k, v, decay, wkv)
        else:
            spans = [slice(*bounds) for bounds in pairwise(cu_seqlens.tolist())]
            parts = [recurrence(q[:, s], k[:, s], v[:, s], decay, one) for s, one in zip(spans, wkv.split(1))]
            y, wkv = torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])
        return self.out(y.flatten(2).to(x.dtype)), ThirdState(wkv, last_token(x, cu_seqlens))


class ChannelMix(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.down = nn.Linear(config.dim_ffn, config.n_embd, bias=False)
        self.deep = Table(config.vocab_size, config.dim_ffn)

    def forward(self, x, tokens):
        """x (B, T, C), tokens (B, T) -> (B, T, C)."""
        return self.down(torch.relu(self.up(x)).square() * self.deep(tokens))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.att, self.ffn = TimeMix(config), ChannelMix(config)

    def forward(self, x, state=None, cu_seqlens=None, tokens=None):
        """x (B, T, C), state ThirdState or None, tokens (B, T) -> (B, T, C), ThirdState."""
        y, state = self.att(self.ln1(x), state, cu_seqlens)
        x = x + y
        return x + self.ffn(self.ln2(x), tokens), state


class Third(LanguageModel):
    make_block = Block
    tables = ("ffn.deep",)


class ThirdFamily(Family):
    name, version, sign = "RWKV-third", ThirdConfig.version, "blocks.0.att.decay"
    targets, parts = TARGETS, ("time", "ln", "emb", "head")
    rows_are_keys, states_in_model = TimeMix.rows_are_keys, False
    kernel = "a loop"

    def dimensions(self, tensors):
        V, C = tensors["emb.weight"].shape
        H, F = tensors[self.sign].shape[0], tensors["blocks.0.ffn.up.weight"].shape[0]
        return ThirdConfig(count_layers(tensors), C, V, dim_att=C, dim_ffn=F, head_size=C // H)

    def new_dimensions(self, n_layer, n_embd, vocab_size, dim_att=0, dim_ffn=0, head_size=0):
        return ThirdConfig(n_layer, n_embd, vocab_size, n_embd, dim_ffn or 2 * n_embd, head_size or 16)

    def shapes(self, config):
        with torch.device("meta"):
            return {key: tuple(tensor.shape) for key, tensor in self.build(config).state_dict().items()}

    def build(self, config, grad_checkpoint=False):
        return Third(config, grad_checkpoint)

    @torch.no_grad()
    def init_weights(self, model):
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        init_around_blocks(model)

    def part_of(self, key):
        if is_time_state(key):
            return names.STATE
        words = {"time": ("amount", "decay"), "ln": ("ln1", "ln2", "ln_out"), "emb": ("emb", "deep"), "head": ("head",)}
        return next((part for part, known in words.items() if set(known) & set(key.split("."))), None)

    def learning_rate(self, key):
        return 1.0, True

    def kernels(self, *names):
        return {"torch": None}


def register():
    """Add the generation to the two tables, wherever they were imported."""
    families = (*models.FAMILIES, ThirdFamily())
    generations = dict(tables.GENERATIONS) | {ThirdFamily.version: ThirdFamily}
    for name, module in list(sys.modules.items()):
        if name.startswith("rwkv_peft"):
            vars(module).update({"FAMILIES": families} if "FAMILIES" in vars(module) else {})
            vars(module).update({"GENERATIONS": generations} if "GENERATIONS" in vars(module) else {})


if __name__ == "__main__":
    register()
    commands.run()
