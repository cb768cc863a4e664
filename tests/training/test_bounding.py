"""train.py --forget_at_most: the end of a run is scaled back until the rows to retain lose no more, on every engine."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rwkv_peft.checkpoints.adapters import AdapterSource
from rwkv_peft.checkpoints.best import take
from rwkv_peft.cli.errors import UserError
from rwkv_peft.inference.loading import load_model
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.inputs import find_samples
from training.runs import metrics, rewound

MOST = 0.05
FLAGS = ("--precision", "fp32", "--val_split", "0.2", "--lr_init", "0.05")


def losses(files, name):
    """(the scale, the loss of the rows to retain at the start, at that scale, and at the end), as a run wrote them."""
    written = json.loads((files / name / "forgetting.json").read_text())
    points = {point["scale"]: point["to keep"]["nats"] for point in written["frontier"]}
    return written["scale"], points[0], points[written["scale"]], points[1]


@pytest.fixture(scope="module")
def bounded(files, train, kept):
    """The output of a run whose whole end would lose too much."""
    return train("bounded", *FLAGS, "--retain_data", kept, "--forget_at_most", str(MOST))[0]


def test_the_newest_file_loses_no_more_than_allowed(files, bounded, kept):
    scale, start, held, end = losses(files, "bounded")
    assert 0 < scale < 1 and held - start <= MOST < end - start
    line = f"{scale:.1%} of what was trained is kept, which loses {held - start:.4f} nats a token"
    assert line in bounded and line in (files / "bounded" / "README.md").read_text()
    assert (files / "bounded" / "forgetting.png").exists() and "held out" in bounded
    first, last = metrics(files, "bounded")[0]["retain_start"], metrics(files, "bounded")[-1]["retain_loss"]
    assert (start, end) == (first, last)  # the metrics are those of the steps

    # measured anew, by the base and the file
    flags = ["--load_model", str(files / "base.pth"), "--data_file", str(files / "data"), "--retain_data", kept]
    samples = find_samples(parse_run([*flags, "--bone_r", "16", "--ctx_len", "24"]).config)[1]["retain"]
    model, _ = load_model(files / "base.pth", [AdapterSource(files / "bounded" / "adapter.safetensors")])
    total = 0.0
    for tokens, mask in (samples[n] for n in range(len(samples))):
        with torch.no_grad():
            logits = model(tokens[None, :-1])[0][0]
        total += torch.nn.functional.cross_entropy(logits.double(), tokens[1:], reduction="none")[mask].sum().item()
    # what is merged is rounded to the base's bfloat16
    assert held == pytest.approx(total / sum(samples.count(n) for n in range(len(samples))), rel=2e-3)


def test_it_lies_on_the_line_and_the_last_checkpoint_holds_the_end(files, bounded):
    folder, (scale, *_) = files / "bounded", losses(files, "bounded")
    newest, end = (load_file(path) for path in (folder / "adapter.safetensors", folder / "adapter-epoch-2.safetensors"))
    assert newest.keys() == end.keys() and all(name.endswith("bone") for name in newest)
    for name, tensor in end.items():  # a Bone block starts at zero
        torch.testing.assert_close(newest[name], scale * tensor)
    (checkpoint,) = folder.glob("checkpoints/step-*8")
    assert all(torch.equal(tensor, end[name]) for name, tensor in load_file(checkpoint / "adapter.safetensors").items())
    assert take(folder).path == folder / "adapter.safetensors" and not take(folder).note


def test_a_resumed_run_ends_alike_and_a_complete_one_says_what_it_lacks(files, train, bounded, kept):
    rewound(files / "bounded", "resumed")
    flags = (*FLAGS, "--retain_data", kept, "--forget_at_most", str(MOST), "--resume")
    train("resumed", *flags)
    assert losses(files, "resumed") == losses(files, "bounded")
    one, other = (load_file(files / name / "adapter.safetensors") for name in ("bounded", "resumed"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    _, complete = train("resumed", *flags, "auto")
    assert not complete
    (files / "resumed" / "forgetting.json").unlink()  # as if the run had been killed behind its last save
    _, refused = train("resumed", *flags, "auto", code=2)
    assert "--forget_at_most: " in refused and "merge_bone.py has that flag, too" in refused


def test_a_run_that_began_without_it_says_where_the_flag_is_of_use(files, train, kept):
    train("began", *FLAGS)
    _, refused = train("began", *FLAGS, "--resume", "--retain_data", kept, "--forget_at_most", "1", code=2)
    assert "the run in" in refused and "began without it, and has not kept where it began; leave it out" in refused


@pytest.mark.parametrize(
    "more", [("--devices", "2"), ("--strategy", "deepspeed_stage_3", "--devices", "2")], ids=["stage 1", "stage 3"]
)
def test_ranks_find_the_same_scale(files, train, kept, more, request):
    """Two ranks with half of a rank's rows each, so that their steps are those of one."""
    names = [f"{kind} {request.node.callspec.id}" for kind in ("one", "several")]
    own = (*FLAGS, "--retain_data", kept, "--forget_at_most", str(MOST))
    train(names[0], *own, "--micro_bsz", "8")
    train(names[1], *own, "--micro_bsz", "4", *more)
    (one, *alone), (several, *shared) = (losses(files, name) for name in names)
    assert one == several and shared == pytest.approx(alone, abs=1e-4)
    files_of = (load_file(files / name / "adapter.safetensors") for name in names)
    for (name, tensor), other in zip(next(files_of).items(), next(files_of).values()):
        torch.testing.assert_close(tensor, other, atol=1e-4, rtol=1e-2, msg=name)


def test_a_model_that_trains_whole_moves_back_towards_its_base(files, train, kept):
    own = ("--peft", "none", "--save_dtype", "fp32", "--lr_init", "1e-2")
    train("whole", *FLAGS[:4], *own, "--retain_data", kept, "--forget_at_most", str(MOST))
    scale, *_ = losses(files, "whole")
    assert 0 < scale < 1
    base = torch.load(files / "base.pth")
    newest, end = (torch.load(files / "whole" / name) for name in ("rwkv.pth", "rwkv-epoch-2.pth"))
    for name, tensor in base.items():
        torch.testing.assert_close(newest[name], torch.lerp(tensor.float(), end[name], scale))


def test_a_run_of_which_each_part_loses_too_much_keeps_all_and_fails(files, train, kept):
    out, _ = train("fails", *FLAGS, "--lr_init", "50", "--retain_data", kept, "--forget_at_most", "0", code=1)
    assert "each part loses more than 0 nats a token: all is kept; read more of what is not to be lost" in out
    newest, end = (files / "fails" / f"{name}.safetensors" for name in ("adapter", "adapter-epoch-2"))
    assert newest.read_bytes() == end.read_bytes()


def test_a_bound_that_holds_leaves_all(files, train, kept):
    out, _ = train("holds", *FLAGS, "--retain_data", kept, "--forget_at_most", "100")
    assert "100.0% of what was trained is kept" in out and losses(files, "holds")[0] == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--forget_at_most", "0.1"], "--forget_at_most 0.1 needs --retain_data"),
        (["--retain_data", "K", "--forget_at_most", "-1"], "--forget_at_most: -1 is negative"),
        (["--retain_data", "K", "--forget_at_most", "1", "--resume", "--fresh_optimizer"], "does not go with --fresh"),
        (
            ["--retain_data", "K", "--forget_at_most", "1", "--data_type", "pairs"],
            "needs --objective next_token: others measure no nats",
        ),
    ],
)
def test_a_bound_without_what_it_needs_is_refused(files, words, message):
    flags = ["--load_model", str(files / "base.pth"), "--data_file", str(files / "data"), "--bone_r", "16"]
    with pytest.raises(UserError, match=message):
        parse_run([*flags, *words])
