"""Several data files in one run: its header, its metrics, and that it goes on to the bit."""

import shutil

import pytest

from rwkv_peft.data.token_file_writer import TokenFileWriter
from training.runs import metrics, rewound

FLAGS = (
    *"--precision fp32 --val_split 0.2 --lr_schedule constant --epoch_steps 3 --micro_bsz 2 --answer_rows 0".split(),
)


@pytest.fixture(scope="module")
def mixed(files):
    with TokenFileWriter(files / "code", vocab_size=80) as writer:
        for start in range(30):
            writer.add([1 + (3 * start + 5 * i) % 79 for i in range(30)] + [0])
    (files / "code.json").write_text('{"vocabulary": null, "tool_form": "hermes"}')
    return (*FLAGS, "--data_mix", "0.25", "0.75", "--data_file", str(files / "data"), str(files / "code"))


def test_a_mixed_run_tells_each_file_and_goes_on_to_the_bit(files, train, mixed):
    out, _ = train("mixed-whole", *mixed)
    assert "25.0% of the counted tokens are of data, read" in out and "is seen of data " in out, out
    assert f"note: {files}/code has tools in another form than {files}/data; chats" in out
    rewound(files / "mixed-whole", "mixed")
    train("mixed", *mixed, "--data_mix", "1", "3", "--resume")  # the same mix
    whole, parts = (metrics(files, name) for name in ("mixed-whole", "mixed"))
    keys = ("loss", "val_loss", "val_loss/data", "val_loss/code", "loss/data", "loss/code")
    assert [[line.get(key) for key in keys] for line in parts] == [[line.get(key) for key in keys] for line in whole]
    last = parts[-1]
    assert min(last[key] for key in keys[2:4]) < last["val_loss"] < max(last[key] for key in keys[2:4])
    learned = [[line[key] for key in keys[4:] if key in line] for line in parts]  # files that a step reads
    for line, losses in zip(parts, learned):
        assert min(losses) - 1e-6 <= line["loss"] <= max(losses) + 1e-6
    assert {len(losses) for losses in learned} == {1, 2}
    assert (
        f"validation loss of code: {whole[2]['val_loss/code']:.4f} at first, {last['val_loss/code']:.4f} at last" in out
    )
    assert "sources   loss of " in out
    assert f", of data {last['val_loss/data']:.4f}, of code {last['val_loss/code']:.4f}" in out
    first, second = ((files / name / "adapter.safetensors").read_bytes() for name in ("mixed-whole", "mixed"))
    assert first == second
    shutil.copytree(files / "mixed", files / "mixed-otherwise")
    _, err = train("mixed-otherwise", *mixed, "--data_mix", "0.5", "0.5", "--epoch_count", "3", "--resume", code=2)
    assert "has data {'mix': [0.25, 0.75]" in err and "this command {'mix': [0.5, 0.5]" in err


def test_replay_is_read_between_the_data_and_validates_nothing(files, train, mixed):
    """And a run goes on to the bit, with the same share alone."""
    flags = (*FLAGS, "--replay", str(files / "code"), "--replay_share", "0.25")
    out, _ = train("replay-whole", *flags)
    assert "75.0% of the counted tokens are of data, read 1.01 times an epoch\n" in out, out
    assert "25.0% of the counted tokens are of code, read " in out and " times an epoch (--replay)\n" in out
    rewound(files / "replay-whole", "replay")
    train("replay", *flags, "--resume")
    whole, parts = (metrics(files, name) for name in ("replay-whole", "replay"))
    keys = ("loss", "val_loss", "loss/data", "loss/code")
    assert [[line.get(key) for key in keys] for line in parts] == [[line.get(key) for key in keys] for line in whole]
    assert any("loss/code" in line for line in whole) and not any("val_loss/code" in line for line in whole)
    first, second = ((files / name / "adapter.safetensors").read_bytes() for name in ("replay-whole", "replay"))
    assert first == second
    _, err = train("replay", *flags, "--replay_share", "0.3", "--epoch_count", "3", "--resume", code=2)
    assert "has data {'replay_share': 0.25" in err and "this command {'replay_share': 0.3" in err


@pytest.mark.parametrize(
    "more, words",
    [
        (("--data_mix", "1"), "--data_mix 1: 1 share of 2 files of --data_file; give one for each"),
        (("--data_mix", "1", "0"), "argument --data_mix"),
        (("--data_type", "pairs"), "several --data_file does not go with --data_type pairs"),
        (("--replay", "absent"), "absent.idx: no such file"),
        (("--replay", "REPEATED"), "is the data itself; name text or rows that the base knows"),
        (("--data_file", "DATA", "REPEATED"), "is given twice; leave one out"),
        (("--replay", "absent", "--replay_share", "1"), "--replay_share: 1 must be below 1"),
    ],
)
def test_shares_that_do_not_fit_are_refused(files, train, mixed, more, words):
    paths = {"DATA": str(files / "data"), "REPEATED": f"{files}/../{files.name}/data"}
    more = [paths.get(word, word) for word in more]
    _, err = train("refused", *mixed, *more, code=2)
    assert words in err and "Traceback" not in err


def test_a_share_needs_several_files(train):
    _, err = train("refused", "--data_mix", "0.5", "0.5", code=2)
    assert "--data_mix 0.5 0.5 needs several --data_file: it is the share of each" in err
