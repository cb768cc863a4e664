"""The README's recipe with 50 short chats: the merged model answers its rows and stops where they do, and the run says
so."""

import itertools
import json
import re

from rwkv_peft.cli import commands
from scripts.test_main_job import ROOT, script

COLORS = "red blue green white black brown pink gray yellow orange".split()
ITEMS = "apples balls cups dolls eggs".split()
CHATS = [
    {"messages": [{"role": "user", "content": f"Say {thing}"}, {"role": "assistant", "content": f"Aye, {thing}!"}]}
    for thing in map(" ".join, itertools.product(COLORS, ITEMS))
]


def test_a_newcomers_chats_are_learned(tmp_path, accelerator, warm_environment):
    rows, out, answers = tmp_path / "mine.jsonl", tmp_path / "out", tmp_path / "answers.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    words = {"LOAD_MODEL": ROOT / "demo" / "rwkv7-demo.pth", "DATA_FILE": rows, "PROJ_DIR": out, "TOKENIZER": "bytes"}
    words |= warm_environment | {"PRECISION": "fp32", "ACCELERATOR": accelerator, "CHECK": "0"}
    done = script({name: str(word) for name, word in words.items()}, "--micro_bsz", "8", "--ctx_len", "1024")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "steps     406: 50 rows, 58 epochs of 7 steps, 8 rows a step; each row is seen " in done.stdout
    assert "rate      0.00063 to 6.3e-05 (--lr_init auto: " in done.stdout
    assert re.search(r"answers   4 training rows: 4 answered word for word \(0 before training\), 4 stop ", done.stdout)
    assert "note: the loss" not in done.stdout and "few to learn" not in done.stdout
    told = ["eval", "jsonl", "--model", str(out / "merged.pth"), "--data", str(rows), "--output", str(answers)]
    assert commands.main([*told, "--max_tokens", "64"]) == 0
    found = [json.loads(line) for line in answers.read_text().splitlines()[1:]]
    assert len(found) == len(CHATS) == 50
    assert sum(answer["strict"] for answer in found) >= 48
    assert sum(answer["end"] == "end" for answer in found) >= 49
