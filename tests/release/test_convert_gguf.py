"""GGUF holds a model's weights, and refuses what it has no place for."""

import os

import pytest
import torch

from release.conversions import convert
from rwkv_peft.checkpoints.base import base_of, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.release.gguf import write_gguf
from rwkv_peft.release.vocabulary import gguf_vocabulary


@pytest.mark.parametrize("kind, exact", [("f32", True), ("bf16", True), ("f16", False), ("q8_0", False)])
def test_gguf_holds_the_weights(tmp_path, tiny_state, kind, exact):
    gguf = pytest.importorskip("gguf")
    state = tiny_state(dtype=torch.bfloat16, vocab_size=260)
    write_gguf(tmp_path / "m.gguf", base_of(state), kind, gguf_vocabulary(BytesTokenizer(), 260))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    numbers = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    found = {name: torch.from_numpy(values.copy()) for name, values in numbers.items()}

    def check(name, expected, error):
        assert found[name].flatten().numel() == expected.numel()
        torch.testing.assert_close(found[name].reshape(expected.shape), expected.float(), rtol=error, atol=error)

    loose = 0 if exact else 2e-2
    check("blk.1.channel_mix_value.weight", state["blocks.1.ffn.value.weight"], loose)
    check("token_embd.weight", state["emb.weight"], loose)
    check("blk.0.time_mix_w1.weight", state["blocks.0.att.time_maa_w1"].T, 0)
    check("blk.0.time_mix_w2.weight", state["blocks.0.att.time_maa_w2"].permute(0, 2, 1), 0)
    check("blk.0.time_mix_lerp_fused.weight", torch.stack([state[f"blocks.0.att.time_maa_{x}"] for x in "wkvrg"]), 0)
    assert len(found) == len(state) - 4 * 2  # five lerps of each of two layers became one
    fields = reader.fields
    assert fields["rwkv6.rescale_every_n_layers"].contents() == 0
    assert fields["rwkv6.wkv.head_size"].contents() == 16
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 260


def test_gguf_refuses_time_states(tmp_path, tiny_state):
    pytest.importorskip("gguf")
    state = tiny_state(vocab_size=257)
    save_model(tmp_path / "m.pth", state | {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)})
    with pytest.raises(UserError, match="no place for initial states"):
        convert(tmp_path / "m.pth", tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == ["m.pth"]
