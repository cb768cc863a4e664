"""A small LLaMA with random weights and a byte tokenizer, and a data file, for trying demo/bone_finetuning.py offline.

python demo/tiny_llama.py --output out/tiny_llama      writes model/ and data.jsonl there
"""

import argparse
import json
import random
from pathlib import Path

import torch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=256)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    write_model(args.output / "model")
    write_data(args.output / "data.jsonl", args.rows)
    print(f"{args.output}/model and {args.output}/data.jsonl ({args.rows} rows)")


def write_model(folder):
    """Write a LLaMA of 128 channels and 2 layers, and a tokenizer of one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ("<unk>", "<s>", "</s>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate((*special, *alphabet))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(special) + len(alphabet),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)


def write_data(path, rows):
    """Write rows of query and response: sums of two numbers below 100."""
    numbers = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            a, b = numbers.randint(0, 99), numbers.randint(0, 99)
            file.write(json.dumps({"query": f"What is {a} + {b}?", "response": f"{a} + {b} = {a + b}."}) + "\n")


if __name__ == "__main__":
    main()
