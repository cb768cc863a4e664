"""Corrects answers of the demo's RWKV-7 in a manner, and learns that by `rwkv-peft learn`: how many corrected answers
and new ones have the manner, and what becomes of the run's own task.

    python benchmarks/learn.py [--seeds 1 2 3] [--ways both no-replay no-bound neither] [--epochs 8]

A run learns the 300 chats of `rwkv-peft demo` ("What is there?"), of which a tenth validates. It is then asked "How
many?" 30 times, and each answer is corrected to `Just 5, captain.`; 20 corrections are learned, and the other 10
questions are new. The old task is 100 further chats. Answers are greedy, and count if they are the rows' letter by
letter. Seconds are those of the whole command, and of the processor, in one thread. docs/benchmarks/training.md has the
last table.
"""

import contextlib
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import DEMO, ROOT, Parser, head, row

import rwkv_peft as rp
from rwkv_peft.cli.commands import main as command
from rwkv_peft.data.feedback import Answered, FeedbackFile

sys.path.insert(0, str(ROOT / "demo"))
from task import documents, draw_fact, tell  # noqa: E402

BASE, ASKED, LONGEST = DEMO["x070"], 100, 64  # questions of the old task, tokens of an answer
CORRECTIONS, NEW = 20, 10
WAYS = {
    "both": [],
    "no-replay": ["--replay_share", "0"],
    "no-bound": ["--forget_at_most", "1000"],
    "neither": ["--replay_share", "0", "--forget_at_most", "1000"],
}


def run(*words):
    """Run a command -> its output."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = command([str(word) for word in words])
    return code, printed.getvalue()


def trained(folder, seed, epochs):
    """The folder of a run on the demo's chats."""
    rows = folder / "chats.jsonl"
    rows.write_text("".join(f"{json.dumps(each)}\n" for each in documents("chats", 300, seed)))
    flags = ["--load_model", BASE, "--data_file", rows, "--data_type", "sft", "--tokenizer", "bytes", "--ctx_len", 256]
    flags += ["--precision", "fp32", "--accelerator", "cpu", "--micro_bsz", 8, "--epoch_count", epochs]
    flags += ["--lr_init", 3e-3, "--val_split", 0.1, "--answer_rows", 0, "--random_seed", seed]
    assert run("train", *flags, "--proj_dir", folder / "out")[0] == 0
    return folder / "out"


def exact(adapter, chats):
    """The number of chats whose last turn is the model's own answer."""
    model = rp.load(BASE, [adapter], precision="fp32", device="cpu")
    answers = model.generate([{"messages": turns[:-1]} for turns in chats], LONGEST, temperature=0)
    return sum(answer.strip() == turns[-1]["content"] for answer, turns in zip(answers, chats)), answers


def corrected(folder, adapter, seed):
    """The chats of the manner, after the run's answers were corrected in a file of feedback."""
    rng, chats = random.Random(f"corrections {seed}"), []
    for _ in range(CORRECTIONS + NEW):
        fact = draw_fact(rng)
        asked = {"role": "user", "content": f"{tell(rng, fact).strip()} How many?"}
        chats.append([asked, {"role": "assistant", "content": f"Just {fact.count}, captain."}])
    right, answers = exact(adapter, chats)
    feedback = FeedbackFile(str(folder / "feedback.jsonl"), rp.tokenizer("bytes"), LONGEST)
    for (asked, better), answer in zip(chats, answers):
        said = {"role": "assistant", "content": answer.strip()}
        feedback.correct(Answered([asked], said, str(BASE), str(adapter)), better["content"])
    return chats, right


def measured(folder, way, seed, chats, old):
    """(scale, of corrections and new questions together and apart, of the old task, nats lost, seconds twice)."""
    began, used = time.monotonic(), time.process_time()
    words = ["--feedback", folder / "feedback.jsonl", "--hold_out", NEW / len(chats), "--random_seed", seed]
    code, _ = run("learn", folder / "out", *words, "--device", "cpu", *WAYS[way])
    seconds, used = time.monotonic() - began, time.process_time() - used
    found = json.loads((folder / "out" / "learned.json").read_text())
    points = {point["scale"]: point for point in found["frontier"]}
    start, best = points[0.0], points[found["scale"]]
    name = "adapter-learned.safetensors" if code == 0 else "adapter.safetensors"
    counts = [round(best[kind]["right"] * of) for kind, of in (("feedback", CORRECTIONS), ("held out", NEW))]
    both, lost = exact(folder / "out" / name, chats)[0], best["to keep"]["nats"] - start["to keep"]["nats"]
    return f"{found['scale']:.3g}", *counts, both, exact(folder / "out" / name, old)[0], f"{lost:.3f}", seconds, used


def main(argv):
    parser = Parser(__doc__, seeds=[1], ways=["both"], epochs=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--epochs", type=int, default=8, help="of the run before")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    head(
        "seed",
        "way",
        "scale",
        "corrected of 20",
        "new of 10",
        "both, generated",
        "old of 100",
        "lost, nats",
        "s",
        "CPU s",
    )
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            adapter = trained(folder, seed, args.epochs) / "adapter.safetensors"
            old = [each["messages"] for each in documents("chats", ASKED, 1000 + seed)]
            chats, right = corrected(folder, adapter, seed)
            row(seed, "before", 0, "", "", right, exact(adapter, old)[0], "", "", "")
            for way in args.ways:
                *cells, seconds, used = measured(folder, way, seed, chats, old)
                row(seed, way, *cells, f"{seconds:.0f}", f"{used:.0f}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
