"""A running server with two adapters and a state, of a tiny model whose answers end at their limits alone."""

import pytest
import torch
from serving import Server

from rwkv_peft.adapters.inject import inject
from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.config import AdapterConfig
from rwkv_peft.inference.loading import load_model, save_state_file
from rwkv_peft.inference.reading import prefill


@pytest.fixture(scope="session")
def files(tmp_path_factory, tiny_state):
    """A folder with base.pth, state.pth and adapters poet.safetensors, coder.safetensors."""
    folder = tmp_path_factory.mktemp("serve")
    state = tiny_state(vocab_size=257, seed=3)
    state["head.weight"] = state["head.weight"] * 4
    state["head.weight"][0] = 0  # logit 0 for the end of text, below the largest of 256 others
    save_model(folder / "base.pth", state)
    base = open_base(folder / "base.pth")
    for seed, name in enumerate(("poet", "coder")):
        config = AdapterConfig(mode="bat-in", rank=8)
        adapted = base.family.load(base.tensors, base.config)
        inject(adapted, config, family=base.family)
        torch.manual_seed(seed)
        tensors = {name: 0.1 * torch.randn(p.shape) for name, p in adapted.named_parameters() if p.requires_grad}
        metadata = AdapterMetadata.from_config(config, base_fingerprint=base.fingerprint)
        save_adapter(folder / f"{name}.safetensors", tensors, metadata)
    model, _ = load_model(folder / "base.pth")
    save_state_file(folder / "state.pth", prefill(model, [[9, 9, 1]])[1], model)
    return folder


@pytest.fixture(scope="session")
def server(files):
    """Four places, four that wait; bodies of 1 MiB."""
    folder = files / "loadable"
    folder.mkdir()
    (folder / "poet.safetensors").write_bytes((files / "poet.safetensors").read_bytes())
    (folder / "calm.pth").write_bytes((files / "state.pth").read_bytes())
    (folder / "link.safetensors").symlink_to(files / "poet.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no adapter")
    (folder / "begun").mkdir()
    (folder / "begun" / "metrics.jsonl").touch()
    running = Server(
        *("--model", files / "base.pth", "--adapter", f"poet={files}/poet.safetensors"),
        *(f"coder={files}/coder.safetensors", "--state", f"calm={files}/state.pth", "--files", folder),
        *("--batch", 4, "--queue", 4, "--body_mib", 1, "--max_tokens", 10**6),
        *("--max_loaded", 2),
        *("--allow_origin", "https://chat.example.org"),
    )
    yield running
    running.stop()


@pytest.fixture(scope="session")
def client(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=1, timeout=60) as client:
        yield client
