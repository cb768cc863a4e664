"""Tokens a second of drawing answers and of learning from them, beside trl's GRPOTrainer on a LLaMA of the same size.

    python benchmarks/grpo.py [--shape 256x896x4] [--vocab 8192] [--length 128] [--tokens 64] [--rounds 5]

Random weights in float32, all of which train; --prompts of --length tokens with --answers each, none of which ends
before its --tokens tokens. Both columns count the answers' tokens; learning is the rest of a step but the optimizer's
update: a forward and a backward pass, with trl also what it makes of answers and rewards before. In turns in one
process on one thread: processor time, medians, and the median of the ratios within a round. trl draws by transformers'
generate with a cache of keys and values; neither has a server beside it.
"""

import statistics
import tempfile
import time
from types import SimpleNamespace

import torch
from common import VERSIONS, Parser, head, new_model, row

from rwkv_peft.inference.settings import Sampling
from rwkv_peft.objectives.grpo import GRPO
from rwkv_peft.training.rollout import RolloutSettings, packed, sample_rollouts
from rwkv_peft.training.step.shared_prefix import share_prefixes
from rwkv_peft.training.step.steps import Whole


def main():
    parser = Parser(__doc__, shape="64x96x2", vocab=64, prompts=2, answers=2, length=4, tokens=2, rounds=1)
    parser.add_argument("--shape", default="256x896x4", help="channels, feed-forward channels, layers")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sides = dict(ours(version, args) for version in VERSIONS)
        sides["LLaMA, trl"] = theirs(args, folder)
        times = {name: [] for name in sides}
        for _ in range(args.rounds + 1):  # the first builds kernels
            for name, (step, _) in sides.items():
                times[name].append(step())
    tokens = args.prompts * args.answers * args.tokens
    rates = {name: [[tokens / part for part in round] for round in found[1:]] for name, found in times.items()}
    head("model", "parameters", "drawing, tokens/s", "learning, tokens/s", "drawing, ratio", "learning, ratio")
    for name, (_, size) in sides.items():
        of = [statistics.median(column) for column in zip(*rates[name])]
        pairs = zip(rates[name], rates["LLaMA, trl"])
        ratios = zip(*([mine / other for mine, other in zip(*pair)] for pair in pairs))
        draws, learns = map(statistics.median, ratios)
        row(name, f"{size:,}", f"{of[0]:.0f}", f"{of[1]:.0f}", f"{draws:.2f}", f"{learns:.2f}")


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def ours(version, args):
    """(A name, (a function that takes a step -> seconds of drawing and of learning, the number of parameters))."""
    channels, ffn, layers = map(int, args.shape.split("x"))
    family, model = new_model(version, layers, channels, args.vocab, dim_ffn=ffn)
    tokenizer = SimpleNamespace(vocab_size=args.vocab, end_id=None, decode=lambda ids: "x" * len(ids))
    step, number = Whole(GRPO()), args.prompts * args.answers
    settings = RolloutSettings(Sampling(top_p=1.0, measured=True), args.tokens, (), number, tokenizer, False)

    def take():
        prompts = [torch.randint(1, args.vocab, (args.length,)).tolist() for _ in range(args.prompts)]
        began = time.process_time()
        groups = sample_rollouts(model, settings, dict(enumerate(prompts)), args.answers)
        drawn = time.process_time()
        answers = [answer for group in groups for answer in group]
        assert all(len(answer.tokens) == args.tokens for answer in answers)
        batch = packed(answers) | {"advantages": torch.randn(number), "shares": torch.ones(number)}
        batch |= {"prompts": torch.tensor(float(args.prompts))}
        step.loss(model, batch | share_prefixes(batch, args.answers), args.prompts).backward()
        model.zero_grad()
        return drawn - began, time.process_time() - drawn

    return f"{family.name}, here", (take, parameters(model))


def theirs(args, folder):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    channels, ffn, layers = map(int, args.shape.split("x"))
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=channels,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=channels // 64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(args.vocab)}, "t1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t1", padding_side="left")
    texts = [" ".join(f"t{n}" for n in torch.randint(2, args.vocab, (args.length,)).tolist()) for _ in range(64)]
    drawing = []

    class Timed(GRPOTrainer):
        def _generate(self, prompts):
            began = time.process_time()
            found = super()._generate(prompts)
            drawing.append(time.process_time() - began)
            return found

    settings = GRPOConfig(
        folder,
        use_cpu=True,
        bf16=False,
        report_to=[],
        num_generations=args.answers,
        per_device_train_batch_size=args.prompts * args.answers,
        max_completion_length=args.tokens,
        gradient_checkpointing=False,
        beta=0.0,
        generation_kwargs={"min_new_tokens": args.tokens},
    )
    reward = lambda completions, **fields: torch.randn(len(completions)).tolist()  # noqa: E731
    data = Dataset.from_dict({"prompt": texts})
    trainer = Timed(LlamaForCausalLM(config), reward, settings, data, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1  # which its train() would set
    batches = iter(trainer.get_train_dataloader())
    model = trainer.accelerator.prepare(trainer.model)

    def take():
        inputs = next(batches)
        began = time.process_time()
        trainer.training_step(model, inputs, None)
        whole = time.process_time() - began
        model.zero_grad()
        return drawing[-1], whole - drawing[-1]

    return take, parameters(trainer.model)


if __name__ == "__main__":
    main()
