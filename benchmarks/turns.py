"""Tokens read, and seconds, of conversations with a tool, beside trl's GRPOTrainer on a LLaMA of the same size.

    python benchmarks/turns.py [--turns 2 4 8] [--shape 256x896x4] [--vocab 8192] [--answers 8] [--rounds 3]

Random weights in float32, all of which train; --answers conversations of each of --prompts prompts of --length tokens.
Both models are made to sample the same: answers of 64 tokens, of which all but the last call the tool of one class
(trl's environment_factory), and a result has 32 tokens with its layout. Tokens read are the positions that enter the
embedding, by a hook on it; tokens trained are those that count in the loss, both of one conversation. Learning is a
forward and a backward pass without the optimizer's update. In turns in one process on one thread: processor time,
medians, and the median of the ratios within a round; the processes that run the tools here do not count.
"""

import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from common import VERSIONS, Parser, head, new_model, row

from rwkv_peft.data.chat import ChatLayout
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.data.tools import TOOL_FORMS
from rwkv_peft.environments.environments import Environments
from rwkv_peft.inference.loading import Subject
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.objectives.grpo import GRPO
from rwkv_peft.training import turns
from rwkv_peft.training.rollout import Rollout, packed
from rwkv_peft.training.step.shared_prefix import share_prefixes
from rwkv_peft.training.step.steps import Whole

TOKENS, RESULT = 64, 32  # of an answer, and of a result with its layout
USER, ANSWER, TOOL = "User: ", "\n\nAssistant:", "\n\nTool:"
CALL = '<tool_call>{"name":"open","arguments":{}}</tool_call>'
ENVIRONMENT = f'''
class Boxes:
    def reset(self, **row):
        self.opened = 0

    def open(self) -> str:
        """Open the next box."""
        self.opened += 1
        return "." * {RESULT - len(ANSWER) - 1}

    def get_reward(self):
        return float(self.opened)
'''
END = "<|end|>"
TEMPLATE = f"""
{{%- for turn in messages -%}}
{{{{- '{USER}' if turn.role == 'user' else ' ' -}}}}{{{{- turn.content -}}}}
{{%- for call in turn.tool_calls or [] -%}}{{{{- call | tojson -}}}}{{%- endfor -%}}
{{{{- '{END}' if turn.role == 'assistant' else '' -}}}}
{{%- endfor -%}}
{{{{- {ANSWER!r} if add_generation_prompt else '' -}}}}
"""
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ANSWER,
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": END, "content": "text"},
    },
}


def main():
    parser = Parser(__doc__, turns=[2], shape="64x96x2", vocab=264, answers=2, length=32, rounds=1)
    parser.add_argument("--turns", type=int, nargs="+", default=(2, 4, 8), help="answers of a conversation")
    parser.add_argument("--shape", default="256x896x4", help="channels, feed-forward channels, layers")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--answers", type=int, default=8, help="conversations of each prompt")
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head(
        *("turns", "model", "sampling, read", "learning, read", "trained", "sampling, s", "learning, s"),
        *("sampling, ratio", "learning, ratio"),
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "boxes.py")
        source.write_text(ENVIRONMENT)
        with Environments.open([f"{source}:Boxes"]) as environments:
            sides = {f"{name}, here": side for name, side in (ours(each, environments, args) for each in VERSIONS)}
            sides["LLaMA, trl"] = theirs(args, folder)
            for side in sides.values():  # builds kernels
                side(min(args.turns))
            for number in args.turns:
                rounds = [{name: side(number) for name, side in sides.items()} for _ in range(args.rounds)]
                show(number, rounds, args.prompts * args.answers)


def show(number, rounds, conversations):
    """Print the rows of conversations of so many turns. rounds: for each, {name: (positions read in sampling and in
    learning, tokens trained, seconds of sampling and of learning)}."""
    for name in rounds[0]:
        *counts, sampling, learning = map(statistics.median, zip(*(each[name] for each in rounds)))
        ratios = [[other / mine for mine, other in zip(each[name][3:], each["LLaMA, trl"][3:])] for each in rounds]
        cells = [f"{count / conversations:,.0f}" for count in counts] + [f"{sampling:.2f}", f"{learning:.2f}"]
        row(number, name, *cells, *(f"{statistics.median(column):.2f}" for column in zip(*ratios)))


class Positions:
    """Counts the positions that enter an embedding; `taken` returns those since the last call."""

    def __init__(self, embedding):
        self.count = 0
        embedding.register_forward_pre_hook(self.add)

    def add(self, module, inputs):
        self.count += inputs[0].numel()

    def taken(self):
        found, self.count = self.count, 0
        return found


def text_of(length):
    """A random text of a user, with which a prompt has `length` tokens."""
    return "".join(random.choices("abcdefgh", k=length - len(USER + ANSWER)))


def answer_of(conversation, ending, length=TOKENS):
    """The text of an answer, other than those of other conversations, because what is alike would be read once."""
    return f" {conversation:0{length - 1 - len(ending)}}{ending}"


class Script:
    """A constraint of the engine that allows these tokens only."""

    def __init__(self, tokens, vocab):
        self.tokens, self.vocab = list(tokens), torch.arange(vocab)

    def allowed(self):
        return self.vocab == self.tokens[0]

    def accept(self, token):
        return token == self.tokens.pop(0)


def ours(version, environments, args):
    """(A family's name, a function of a number of turns that takes a step -> what `show` prints)."""
    channels, ffn, layers = map(int, args.shape.split("x"))
    family, model = new_model(version, layers, channels, args.vocab, dim_ffn=ffn)
    tokenizer = BytesTokenizer()
    tokenizer.vocab_size = args.vocab  # so that both models sample from as many tokens
    step, number, read = Whole(GRPO()), args.prompts * args.answers, Positions(model.emb)
    calls = [tokenizer.encode(answer_of(key, CALL + TOOL)) for key in range(number)]
    lasts = [[*tokenizer.encode(answer_of(key, "", TOKENS - 1)), tokenizer.end_id] for key in range(number)]
    made = turns.completion_of

    def take(most):
        def scripted(turn, sampling):
            completion, place = made(turn, sampling), turn.conversation
            scripts = lasts if place.answers == most - 1 else calls
            completion.constraint = Script(scripts[place.number], args.vocab)
            return completion

        turns.completion_of = scripted
        longest = most * (TOKENS + RESULT)
        sampling = Sampling(temperature=1.0, top_p=1.0, measured=True)
        settings = turns.TurnSettings(
            sampling, most, TOKENS, longest, (), number, ChatLayout(tool_form=TOOL_FORMS["hermes"])
        )
        prompts = [tokenizer.encode(USER + text_of(args.length) + ANSWER) for _ in range(args.prompts)]
        read.taken()
        began = time.process_time()
        places, _ = environments.begin([{}] * number)
        episodes = [
            turns.Episode(key, prompts[key // args.answers], place, random.Random(key))
            for key, place in enumerate(places)
        ]
        model.eval()
        turns.converse(Subject(model, None, tokenizer), environments, episodes, settings)
        scores = environments.scores(places)
        environments.release(places)
        sampled, positions = time.process_time(), read.taken()
        assert scores == [most - 1] * number and all(each.end == "end" for each in episodes)
        model.train()
        batch = packed(list(map(Rollout.of, episodes)))
        batch |= {"advantages": torch.randn(number), "shares": torch.ones(number)}
        batch |= {"prompts": torch.tensor(float(args.prompts))}
        step.loss(model, batch | share_prefixes(batch, args.answers), args.prompts).backward()
        model.zero_grad()
        learned = time.process_time()
        trained = sum(sum(each.sampled) for each in episodes)
        return positions, read.taken(), trained, sampled - began, learned - sampled

    return family.name, take


def theirs(args, folder):
    """The function of a number of turns that takes a step by trl."""
    from datasets import Dataset
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token="<|pad|>", padding_side="left")
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE
    channels, ffn, layers = map(int, args.shape.split("x"))
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=channels,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=channels // 64,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    number, scripts, sampled = args.prompts * args.answers, [], []
    call, last = (
        torch.tensor([tokenizer.encode(answer_of(key, ending, TOKENS - 1) + END) for key in range(number)])
        for ending in (CALL, "")
    )

    class Timed(GRPOTrainer):
        def _generate(self, prompts):
            began = time.process_time()
            found = super()._generate(prompts)
            sampled.append((read.taken(), sum(map(sum, found[2])), time.process_time() - began))
            return found

    def scripted(generate, input_ids, **options):
        start, script = input_ids.shape[1], scripts.pop(0)

        def forced(input_ids, scores):
            only = torch.full_like(scores, -torch.inf)
            return only.scatter_(1, script[:, input_ids.shape[1] - start, None], 0.0)

        return generate(input_ids=input_ids, logits_processor=[forced], **options)

    settings = GRPOConfig(
        folder,
        use_cpu=True,
        bf16=False,
        report_to=[],
        num_generations=args.answers,
        per_device_train_batch_size=number,
        max_completion_length=max(args.turns) * (TOKENS + RESULT),
        gradient_checkpointing=False,
        beta=0.0,
    )
    boxes = {}
    exec(ENVIRONMENT, boxes)
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text_of(args.length)}] for _ in range(256)]})
    model = LlamaForCausalLM(config)
    model.generate = partial(scripted, model.generate)
    read = Positions(model.model.embed_tokens)
    trainer = Timed(
        model, args=settings, train_dataset=data, processing_class=tokenizer, environment_factory=boxes["Boxes"]
    )
    trainer.current_gradient_accumulation_steps = 1  # which its train() would set
    batches = iter(trainer.get_train_dataloader())
    prepared = trainer.accelerator.prepare(trainer.model)

    def take(most):
        scripts[:] = [call] * (most - 1) + [last]
        inputs = next(batches)
        read.taken()
        began = time.process_time()
        trainer.training_step(prepared, inputs, None)
        whole = time.process_time() - began
        prepared.zero_grad()
        positions, trained, seconds = sampled[-1]
        assert not scripts and all(each.opened == most - 1 for each in trainer.environments)
        return positions, read.taken(), trained, seconds, whole - seconds

    return take


if __name__ == "__main__":
    main()
