"""Compiles a grammar in a process of its own first, within bounds: for some schemas of a few bytes, as a multipleOf of
a large prime, llguidance takes hours and all memory, and nothing can stop it from within.

The process does without torch, which alone would exceed the bound on memory."""

import subprocess
import sys

import llguidance

from ...children import python_command
from ...system import bound_process

SECONDS, MEMORY = 2, 1 << 30  # of a processor; bytes


class Bytes:
    """The smallest vocabulary; the cost of a grammar hardly depends on it."""

    eos_token_id, bos_token_id = 0, None
    special_token_ids = (0,)
    tokens = (b"<|endoftext|>", *(bytes([byte]) for byte in range(256)))

    def __call__(self, text: bytes) -> list[int]:
        return [byte + 1 for byte in text]


def compiles(grammar: str) -> bool:
    """True if llguidance finishes a grammar within the bounds, valid or not."""
    command = python_command("rwkv_peft.inference.serve.trial")
    try:
        done = subprocess.run(command, input=grammar.encode(), capture_output=True, timeout=10 * SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> int:
    bound_process(SECONDS, MEMORY)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), n_vocab=len(Bytes.tokens))
    llguidance.LLMatcher(tokenizer, sys.stdin.read(), log_level=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
