"""The optimizers of --optim: their steps against formulas and packages, runs that stop and go on with the
settings of their flags, and DeepSpeed's Adam, which is built on first use."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier, local
from types import SimpleNamespace

import pytest
import torch
from deepspeed.ops import adam
from torch import nn
from torch.utils.cpp_extension import _get_build_directory

from rwkv_peft.adapters.groups import parameter_groups
from rwkv_peft.checkpoints.tensors import read_pth
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig, TrainConfig, to_json
from rwkv_peft.ops import products
from rwkv_peft.training import optimizers
from rwkv_peft.training.engine import ParameterSlice, TrainingEngine
from rwkv_peft.training.optimizers import BY_RANK, cpu_adam, make_optimizer, orthogonal
from rwkv_peft.training.saving.checkpoints import find_checkpoint, write_state
from rwkv_peft.training.saving.optimizer_state import SavedOptimizer, write_pieces
from rwkv_peft.training.saving.resume import read_run_state
from training.runs import metrics, rewound

RATE, DECAY, STEPS = 1e-2, 0.1, 5
BOTH = ("--train_parts", "state", "ln", "--state_lr", "2e-2")
HALF = ("--epoch_count", "1")
WORDS = "an offload strategy needs DeepSpeed's Adam for the CPU, which cannot be built here: "
FLAGS = "--train_parts ln time --weight_decay 0.01 --val_split 0.1".split()


class OneFlat(TrainingEngine):
    """An engine of one rank: an optimizer of --optim over a flat tensor of random weights, one parameter's."""

    flats = property(lambda self: [self.flat])

    def __init__(self, optim, size=600, seed=0, **group):
        self.flat = torch.randn(size, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        groups = [{"params": [self.flat], "weight_decay": DECAY, "lr_scale": 1.0, **group}]
        self.optimizer = make_optimizer(groups, TrainConfig(optim=optim))
        self.model = SimpleNamespace(named_parameters=lambda: [("weight", self.flat)])
        self.set_rate(RATE)

    def place(self, parameter):
        return ParameterSlice(len(self.flat), 0, 0, 0, len(self.flat))

    def step(self, gradient):
        self.flat.grad = gradient.clone()
        self.optimizer.step()

    def backward(self, loss):
        """Not called."""

    def publish(self):
        """The flat tensor is the model's own."""


def gradients(size=600):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, generator=generator) for _ in range(STEPS)]


def run(engine, several):
    for gradient in several:
        engine.step(gradient)
        yield engine.flat.detach().clone()


@pytest.mark.parametrize("optim", ("adamw", "adamw8bit", "muon"))
@pytest.mark.processor
def test_an_optimizer_goes_on_to_the_bit_from_what_a_checkpoint_keeps(optim, tmp_path):
    size = 6000 if optim == "adamw8bit" else 600  # fewer have moments of 32 bits
    matrices = {"shapes": ((20, size // 20),)} if optim == "muon" else {}
    whole, other = (OneFlat(optim, size, seed, **matrices) for seed in (0, 1))
    assert whole.is_by_parameter == (optim not in BY_RANK)
    list(run(whole, gradients(size)[:3]))
    write_pieces(tmp_path, 0, whole.pieces(), whole.steps_taken, whole.codes())
    saved = SavedOptimizer(tmp_path)
    for piece in other.pieces():
        saved.fill(piece)
    saved.fill_codes(0, other.codes())
    other.go_on(saved.steps)
    rest = gradients(size)[3:]
    for mine, theirs in zip(run(other, rest), run(whole, rest), strict=True):
        assert torch.equal(mine, theirs)


def test_moments_of_8_bits_are_near_adams():
    made, plain = OneFlat("adamw8bit", 6000), OneFlat("adamw", 6000)
    (*_, found), (*_, due) = (run(one, gradients(6000)) for one in (made, plain))
    start = OneFlat("adamw", 6000).flat.detach()
    assert made.optimizer.state[made.flat]["state1"].dtype == torch.uint8
    assert 0 < (found - due).norm() / (due - start).norm() < 0.05


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
@pytest.mark.parametrize("ranks", (1, 3))
@pytest.mark.processor
def test_muon_over_ranks_is_torchs_over_whole_matrices(monkeypatch, ranks):
    monkeypatch.setattr(products, "converts", lambda x: False)  # torch multiplies in bfloat16 on every processor
    shapes, sizes, length = ((8, 12), (30, 10), (14, 6), (6, 20)), [96, 300, 84, 120], 600 // ranks
    whole = OneFlat("muon").flat.detach()
    matrices = [torch.nn.Parameter(x.view(shape).clone()) for x, shape in zip(whole.split(sizes), shapes)]
    theirs = torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients():
        for matrix, part in zip(matrices, gradient.split(sizes)):
            matrix.grad = part.view(matrix.shape).clone()
        theirs.step()
    parts, meet, here = {}, Barrier(ranks), local()

    def gathered(part):
        parts[here.rank] = part
        meet.wait()
        found = torch.cat([parts[rank] for rank in range(ranks)])
        meet.wait()
        return found, here.rank * length

    def trained(rank):
        here.rank, made = rank, OneFlat("muon", length, shapes=shapes)
        made.flat.data = whole.split(length)[rank].clone()
        return list(run(made, [gradient.split(length)[rank] for gradient in gradients()]))[-1]

    monkeypatch.setattr(optimizers, "gathered_parts", gathered)
    with ThreadPoolExecutor(ranks) as pool:
        found = torch.cat(list(pool.map(trained, range(ranks))))
    torch.testing.assert_close(found, torch.cat([matrix.detach().view(-1) for matrix in matrices]))


def test_muon_takes_the_matrices_of_blocks_and_of_adapters():
    names = {"emb.weight": 2, "blocks.0.att.key.weight": 2, "blocks.0.att.key.bone": 2, "blocks.0.ln1.weight": 1}
    names |= {"blocks.0.att.time_faaaa": 2, "blocks.0.att.value.bone": 3, "head.weight": 2, "a.lora_gain": 1}
    parameters = [(name, nn.Parameter(torch.ones((4,) * dims))) for name, dims in names.items()]
    model = SimpleNamespace(named_parameters=lambda: parameters)
    whole, matrices = parameter_groups(model, matrices_apart=True)
    assert (len(whole["params"]), whole["shapes"], matrices["shapes"]) == (5, (), ((4, 4), (4, 4), (4, 4, 4)))


def test_a_row_of_matrices_is_as_each_by_itself():
    matrices = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonal(matrices), torch.stack([orthogonal(x) for x in matrices]))
    values = torch.linalg.svdvals(orthogonal(matrices).float())
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_state_of_use_to_its_ranks_alone_is_refused_by_others(tmp_path):
    adapter = json.loads(to_json(AdapterConfig()))
    now = {"adapter": adapter, "base": "", "data": {"mix": []}, "objective": "next-token", "teacher": ""}
    now |= {"precision": "bf16", "strategy": "deepspeed_stage_1", "world_size": 2}
    own = {"retained": "", "samples_seen": 1, "trained": [], "validated_from": 0, "validation": ""}
    (tmp_path / "optimizer").mkdir()
    for optim, change, words in (
        ("adamw8bit", {"world_size": 1}, "has world_size 2, this command 1.*--fresh_optimizer"),
        ("muon", {"world_size": 1}, ""),
        ("muon", {"optim": "adamw"}, "has optim muon, this command adamw.*--fresh_optimizer"),
    ):
        write_state(tmp_path / "state.json", now | own | {"optim": optim, "files": {}})
        with pytest.raises(UserError, match=words) if words else nullcontext():
            read_run_state(tmp_path, now | {"optim": optim} | change)


def test_codes_of_a_rank_are_read_to_the_bit_or_refused(tmp_path):
    codes = {"0:state1": torch.arange(256).to(torch.uint8), "0:absmax1": torch.randn(1), "1:state1": torch.randn(9)}
    write_pieces(tmp_path, 1, [], 3, codes)
    saved, found = SavedOptimizer(tmp_path), {name: torch.zeros_like(tensor) for name, tensor in codes.items()}
    saved.fill_codes(1, found)
    assert saved.steps == 3 and all(torch.equal(tensor, found[name]) for name, tensor in codes.items())
    for rank, other in ((0, codes), (1, {"0:state1": torch.zeros(256)}), (1, {"1:state1": torch.zeros(8)})):
        with pytest.raises(UserError, match="does not hold the optimizer's state of this run: codes.*fresh_optimizer"):
            saved.fill_codes(rank, other)


@pytest.mark.parametrize("optim", ("muon",))
@pytest.mark.processor
def test_a_run_resumes_bitwise(files, train, optim):
    whole, parts = (files / f"{name}-{optim}" for name in ("whole", "parts"))
    train(whole.name, *FLAGS, "--optim", optim)
    rewound(whole, parts.name)
    out, _ = train(parts.name, *FLAGS, "--optim", optim, "--resume")
    assert "resuming after step 4" in out and f"optimizer {optim}" in out
    assert (whole / "adapter.safetensors").read_bytes() == (parts / "adapter.safetensors").read_bytes()
    lines, others = (
        [(line["loss"], line.get("val_loss")) for line in metrics(files, path.name)] for path in (whole, parts)
    )
    assert lines == others and lines[-1][1] < lines[3][1]


@pytest.mark.parametrize("stage", ("1", "3"))
def test_a_resumed_run_has_the_settings_of_its_flags(files, train, stage):
    name, flags = f"stage-{stage}", (*BOTH, "--strategy", f"deepspeed_stage_{stage}")
    train(name, *flags, *HALF)
    before = read_pth(files / name / "state.pth")  # replaced, not written over
    shutil.copytree(files / name, files / f"{name}-decayed")
    train(name, *flags, "--resume", "--state_lr", "0")
    after = read_pth(files / name / "state.pth")
    assert after and all(tensor.any() and torch.equal(tensor, before[key]) for key, tensor in after.items())
    train(f"{name}-decayed", *flags, "--resume", *"--beta1 0 --beta2 0 --weight_decay 0.1 --state_lr 1e-2".split())
    found = SavedOptimizer(find_checkpoint(files / f"{name}-decayed")).pieces  # other groups than before, too
    moments = [
        (parts, found["exp_avg_sq", parameter]) for (kind, parameter), parts in found.items() if kind == "exp_avg"
    ]
    assert moments
    for first, second in moments:  # without memory, both are of the last gradient
        for (_, mean), (_, square) in zip(first, second, strict=True):
            torch.testing.assert_close(mean**2, square)


def test_offload_without_a_compiler_says_what_it_needs(train, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    monkeypatch.setenv("PATH", str(tmp_path))
    out, err = train("lacks", "--strategy", "deepspeed_stage_2_offload", code=2)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {WORDS}") and "apt install g++" in line and "Traceback" not in err
    assert "compiling DeepSpeed's Adam" in out


def test_a_folder_of_extensions_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=f"{WORDS}.*Not a directory.*TORCH_EXTENSIONS_DIR"):
        cpu_adam([])


def test_a_lock_that_a_killed_build_left_is_removed(monkeypatch, tmp_path):
    """torch's build waits for it forever."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = Path(_get_build_directory("cpu_adam", verbose=False)) / "lock"
    lock.touch()

    class Built(Exception):
        pass

    def build(groups, **settings):
        assert not lock.exists()
        raise Built

    monkeypatch.setattr(adam, "DeepSpeedCPUAdam", build)
    with pytest.raises(Built):
        cpu_adam([])
