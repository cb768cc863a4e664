"""A running server with two adapters and a state, of a tiny model whose answers end at their limits alone."""

import pytest
from serving import Server

from inference.engines import spread_logits
from inference.test_engine import adapter_file
from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.inference.forward import prefill
from rwkv_peft.inference.loading import load_model, save_state_file


@pytest.fixture(scope="session")
def files(tmp_path_factory, tiny_state):
    """A folder with base.pth, state.pth and adapters poet.safetensors, coder.safetensors."""
    folder = tmp_path_factory.mktemp("serve")
    state = spread_logits(tiny_state, vocab_size=257)
    state["head.weight"][0] = 0  # logit 0 for the end of text, below the largest of 256 others
    save_model(folder / "base.pth", state)
    for seed, name in enumerate(("poet", "coder")):
        adapter_file(folder / "base.pth", folder / f"{name}.safetensors", seed)
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
    (files / "states").mkdir()
    running = Server(
        *("--model", files / "base.pth", "--adapter", f"poet={files}/poet.safetensors"),
        *(f"coder={files}/coder.safetensors", "--state", f"calm={files}/state.pth", "--files", folder),
        *("--states", files / "states"),
        *("--batch", 4, "--queue", 4, "--body_mib", 1, "--max_tokens", 10**6),
        *("--max_loaded", 2, "--feedback", files / "feedback.jsonl"),
        *("--allow_origin", "https://chat.example.org"),
    )
    yield running
    running.stop()


@pytest.fixture(scope="session")
def client(server):
    pytest.importorskip("openai")
    with server.client() as client:
        yield client
