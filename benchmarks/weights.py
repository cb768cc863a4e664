"""What weights in blocks cost: the loss of a model on texts that it knows, by the weights that `--weights` gives it.

    python benchmarks/weights.py [--model demo/rwkv6-demo.pth demo/rwkv7-demo.pth] [--documents 200]
    python benchmarks/weights.py --model tiny.pth --text stories.txt --encoding utf-16-le --first 0

Texts are the demo's stories, from another seed than those of its training, whose answers alone count, as they did
there; or pieces of 1,024 tokens of a file, whose bytes are tokens from --first on. "apart" is the Kullback-Leibler
divergence from the model in full precision.
"""

import json
import tempfile
from pathlib import Path

import torch
from common import DEMO, ROOT, Parser, head, row, run

from rwkv_peft.inference.loading import load_model

KINDS = ({"precision": "fp32"}, {"precision": "bf16"}, {"weights": "int8"}, {"weights": "int4"})
PIECE = 1024


def main():
    parser = Parser(__doc__, model=(DEMO["x070"],), documents=2)
    parser.add_argument("--model", nargs="+", default=list(DEMO.values()))
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--text", help="a file in place of the demo's stories")
    parser.add_argument("--encoding", default="utf-8")
    parser.add_argument("--first", type=int, default=1, help="the token of byte 0")
    args = parser.parse_args()
    texts = [torch.tensor(list(text)) + args.first for text in read(args)]
    counted = torch.cat(
        [torch.ones(len(text) - 1).bool() if args.text else answers(text - args.first) for text in texts]
    )
    right = torch.cat([text[1:] for text in texts])[counted, None]
    head("model", "weights", "nats a token", "more than fp32", "apart")
    for path in args.model:
        whole = None
        for kind in KINDS:
            model, _ = load_model(path, **kind)
            found = torch.cat([log_probabilities(model, text) for text in texts])[counted]
            loss = -found.gather(1, right).mean().item()
            whole = whole or (found, loss)
            apart = (whole[0].exp() * (whole[0] - found)).sum(1).mean().item()
            (word,) = kind.values()
            row(Path(path).stem, word, f"{loss:.5f}", f"{100 * (loss / whole[1] - 1):+.2f} %", f"{apart:.6f}")


def answers(text):
    """True for the bytes after the first (T - 1,) that belong to an answer: those after A: in a line."""
    found, line = [], b""
    for byte in text.tolist():
        found.append(line.startswith(b"A:"))
        line = b"" if byte == ord("\n") else line + bytes([byte])
    return torch.tensor(found[1:])


@torch.inference_mode()
def log_probabilities(model, text):
    """text (T,) -> (T - 1, V) of the tokens after each."""
    return model(text[None, :-1])[0][0].double().log_softmax(-1)


def read(args):
    """The bytes of each text."""
    if args.text:
        data = Path(args.text).read_text(encoding="utf-8")[: args.documents * PIECE].encode(args.encoding)
        return [data[i : i + PIECE] for i in range(0, min(len(data), args.documents * PIECE), PIECE)]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "stories.jsonl"
        run(ROOT / "demo" / "task.py", "base", "--documents", args.documents, "--seed", 77, "--output", made)
        return [json.loads(line)["text"].encode() for line in made.read_text().splitlines()]


if __name__ == "__main__":
    main()
