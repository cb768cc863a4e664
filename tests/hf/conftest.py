"""A small LLaMA, the real one if the shared data is present, and its tokenizer."""

import copy
from pathlib import Path

import pytest
import torch

import tiny_llama

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "llama_stories260K_hf"


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A model folder: the trained TinyStories LLaMA, or one of about its size made from a config."""
    if REAL.is_dir():
        return REAL
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=172, max_position_embeddings=512, pad_token_id=0)
    heads = dict(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _loaded(llama_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()


@pytest.fixture
def llama(_loaded):
    """A fresh float32 LLaMA, of widths 64, 32 and 172: 4 divides all of them."""
    return copy.deepcopy(_loaded)


@pytest.fixture(scope="session")
def ids():
    return torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The model folder and data file that scripts/bone_llama.sh makes."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama.write_model(folder / "model")
    tiny_llama.write_data(folder / "data.jsonl", 32)
    return folder
