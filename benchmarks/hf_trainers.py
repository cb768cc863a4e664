"""trl's trainers on an RWKV with Bone: each trains the demo's model, is merged into a .pth by merge_bone.py, and must
draw the same tokens in the `rwkv` package.

    python benchmarks/hf_trainers.py                          # all four, a few minutes on two CPU cores
    python benchmarks/hf_trainers.py --trainers dpo kto --steps 20
    python benchmarks/hf_trainers.py --model demo/rwkv6-demo.pth

A row tells the loss of the first step and the last, of GRPO, whose loss begins at 0, the mean reward.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from common import DEMO, Parser, row

from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.hf import BoneConfig, RWKVForCausalLM, RWKVTokenizer
from rwkv_peft.release.merge_command import main as merge
from rwkv_peft.release.runtimes import rwkv_sequence

STORY = "Ann has 3 red balls.\nQ: What color?\nA:"


def common(folder, steps):
    """The settings of transformers' TrainingArguments that all trainers share."""
    return dict(
        output_dir=str(folder / "out"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def sft(given, model, settings):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": STORY, "completion": " crimson\n"}, {"prompt": "Q: Say it\nA:", "completion": " Aye\n"}] * 8
    config = SFTConfig(**settings, max_length=64)
    return SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), **given)


def dpo(given, model, settings):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": STORY, "chosen": " crimson\n", "rejected": " red\n"}] * 16
    return DPOTrainer(model, args=DPOConfig(**settings), train_dataset=Dataset.from_list(rows), **given)


def kto(given, model, settings):
    from datasets import Dataset
    from trl.experimental.kto import KTOConfig, KTOTrainer

    rows = [
        {"prompt": STORY, "completion": " crimson\n", "label": True},
        {"prompt": STORY, "completion": " red\n", "label": False},
    ] * 8
    return KTOTrainer(model, args=KTOConfig(**settings), train_dataset=Dataset.from_list(rows), **given)


def grpo(given, model, settings):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def vowels(completions, **_):
        return [float(sum(letter in "aeiou" for letter in text)) for text in completions]

    config = GRPOConfig(**settings, num_generations=4, max_completion_length=8, temperature=1.0)
    rows = Dataset.from_list([{"prompt": STORY}, {"prompt": "Q: Say it\nA:"}] * 8)
    return GRPOTrainer(model, reward_funcs=vowels, args=config, train_dataset=rows, **given)


TRAINERS = {"sft": sft, "dpo": dpo, "grpo": grpo, "kto": kto}


def agreeing(model, tokenizer, merged, length=24):
    """(tokens that the rwkv package would draw as well, tokens that the merged Hugging Face model draws)."""
    prompt = tokenizer(STORY, return_tensors="pt").input_ids
    with torch.no_grad():
        drawn = model.generate(prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False)[0]
    base = open_base(merged)
    logits = rwkv_sequence(Path(merged), drawn, base.config).clone()
    logits[:, 0] = -torch.inf  # min_new_tokens forbids the end
    same = logits[prompt.shape[1] - 1 : -1].argmax(-1) == drawn[prompt.shape[1] :]
    return int(same.sum()), length


def run(name, path, steps):
    """Train, save, merge, compare and print a row of the table -> whether all tokens agree."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, tokenizer = RWKVForCausalLM.from_pth(path, dtype=torch.float32), RWKVTokenizer("bytes")
        config = BoneConfig(r=32, init_weights="bat-in", target_modules="all-linear")
        given = {"processing_class": tokenizer, "peft_config": config}
        trainer = TRAINERS[name](given, model, common(folder, steps))
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        trainer.save_model(str(folder / "adapter"))
        told = "reward" if name == "grpo" else "loss"
        found = [entry[told] for entry in trainer.state.log_history if told in entry]
        merged = folder / "merged.pth"
        files = ["--base_model", str(path), "--bone_checkpoint", str(folder / "adapter"), "--output", str(merged)]
        merge([*files, "--output_dtype", "fp32"])
        same, total = agreeing(RWKVForCausalLM.from_pth(merged), tokenizer, merged)
    row(name, Path(path).stem, f"{told} {found[0]:.3f}, {found[-1]:.3f}", f"{same} of {total}", f"{seconds:.0f} s")
    return same == total


def main():
    parser = Parser(__doc__, trainers=("dpo",), steps=1)
    parser.add_argument("--model", default=str(DEMO["x070"]), help="a .pth with the vocabulary of bytes")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=TRAINERS)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    return 0 if all([run(name, args.model, args.steps) for name in args.trainers]) else 1


if __name__ == "__main__":
    sys.exit(main())
