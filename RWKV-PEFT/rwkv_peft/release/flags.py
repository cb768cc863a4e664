"""The flags of merge, check, prove, inspect, convert and push: argv -> the parsed flags, or UserError.

They are checked before torch is imported, so that a mistake is reported at once.
"""

import argparse
import re
from types import MappingProxyType

from ..checkpoints.source_flags import ScaledFiles, add_source_flags
from ..cli.names import GGUF_TYPES, QUANTS, called
from ..cli.parser import Parser, constrained, not_negative, positive, up_to
from ..cli.rules import EXCLUDES, NEEDS, Rule
from ..config import QUANTIZATIONS
from .probe import add_endpoint_flags

DTYPES = ("keep", "bf16", "fp16", "fp32")
# flags of RWKV-PEFT's earlier mergers and of train.py -> the flag here
MERGE_SYNONYMS = MappingProxyType(
    {
        "--use_gpu": "--device cuda",
        "--load_model": "--base_model",
        "--bone_load": "--adapter",
        "--lora_load": "--adapter",
        "--pissa_load": "--adapter",
        "--pissa_init": "--lora_init",
        "--scale": "--adapter FILE=SCALE",
    }
)
MOST_TOKENS = 1 << 14  # for check: 8 GiB of logits in float64 over the World vocabulary
repository = constrained(
    str,
    lambda name: bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)),
    "is no name of a repository; give it as NAME/REPO, with your name or your organization's first",
)
BASE_FLAGS = ("--base_model", "--model")
ADAPTER_FLAGS = ("--bone_checkpoint", "--adapter", "--lora_checkpoint", "--peft_checkpoint", "--state_checkpoint")
MERGE = "merge_bone.py"
MERGE_RULES = (
    Rule(MERGE, NEEDS, "--output, --dry_run", "it writes the merged model", "name its .pth, or add --dry_run"),
    Rule("--forget_at_most", NEEDS, "--keep", "it is the most that those rows may lose", "name the rows"),
    Rule("--keep", NEEDS, "--forget_at_most", "its rows are measured for that", "add it, in nats a token"),
    Rule("--tokenizer", NEEDS, "--keep", "it is that of those rows", "leave it out"),
)
PROVE_RULES = (
    Rule("--model, --api_key", NEEDS, "--url", "they are an endpoint's", "give its address"),
    Rule("--output, --load_model, --data_file", EXCLUDES, "--url", "they are about writing a proof"),
)
CHECK = "rwkv-peft check"
CHECK_RULES = (
    Rule(CHECK, NEEDS, "--bone_checkpoint, --runtimes", "it compares with base and adapter, or asks those", "give one"),
    Rule("--bone_checkpoint", NEEDS, "--base_model", "it is an adapter of that", "name the base of the merge"),
    Rule("--base_model", NEEDS, "--bone_checkpoint", "the merge of both is compared", "name the adapter"),
    Rule("--any_base", NEEDS, "--bone_checkpoint", "it is about the base that an adapter names", "leave it out"),
    Rule("--gguf_types", NEEDS, "--runtimes", "llama.cpp is one of them", "add it"),
)
CONVERT_RULES = (Rule("--lora_rank", NEEDS, "--to lora", "it is the rank of that form", "add --to lora"),)
ADAPTER_TYPES = ("bone", "disha", "lora", "pissa", "state")  # RWKV-PEFT's words


def merge_flags(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog=MERGE,
        rules=MERGE_RULES,
        synonyms=MERGE_SYNONYMS,
        values={(flag, value): called(value, ours) for flag, ours, values in QUANTS for value in values},
        description="Merge adapters into an RWKV base model: a .pth with exactly the base's keys, order, shapes and "
        "dtypes, which any RWKV runtime loads.",
    )
    add = parser.add_argument
    add(*BASE_FLAGS, required=True, metavar="MODEL", help="the .pth or folder that the adapter was trained on")
    add(
        *ADAPTER_FLAGS,
        "--state",
        required=True,
        action=ScaledFiles,
        nargs="+",
        metavar="FILE[=SCALE]",
        dest="adapters",
        help="adapters in order of application, mine=0.7 for 0.7 times the change: .safetensors of train.py, or the "
        "folder of its run, flat .pth of RWKV-PEFT (.bone, .disha, LoRA, PiSSA, time states), or folders of Hugging "
        "Face peft",
    )
    add(
        "--type",
        choices=ADAPTER_TYPES,
        help="kind of the adapters, in the words of RWKV-PEFT's scripts; the files say it, and another is refused",
    )
    add("--output", metavar="PTH", help="the merged model; required unless --dry_run")
    add(
        "--state_output",
        metavar="FILE",
        help="write tuned time states to a file of their own (.pth for RWKV-Runner and ChatRWKV, .st for web-rwkv and "
        "Ai00), and leave them out of --output",
    )
    add(
        "--output_dtype",
        choices=DTYPES,
        default="keep",
        help="dtype of the merged model's tensors (default: keep, each has its own of the base)",
    )
    add_source_flags(parser)
    add(
        "--quant",
        choices=QUANTIZATIONS,
        help="quantization of the frozen weights in training (default: what the adapter says)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device of the arithmetic (default: cpu)")
    add(
        "--any_base",
        action="store_true",
        help="do not compare the base with the one that the adapter names: merge into another of the same shape",
    )
    bound = "the most nats a token that the rows of --keep may lose beside the base; if they lose more, the change is "
    bound += "scaled back to the largest scale that holds, as FILE=SCALE does"
    add("--forget_at_most", type=not_negative, metavar="NATS", help=bound)
    add("--keep", metavar="FILE", help="rows that must not be lost, such as chats of what the base can do")
    add("--tokenizer", metavar="NAME", help="of --keep: world, bytes or a tokenizer.json (default: the run's)")
    add("--dry_run", action="store_true", help="compute and report everything, write nothing")
    return parser.parse_args(argv)


def check_flags(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog=CHECK,
        rules=CHECK_RULES,
        synonyms={"--base": "--model"},
        description="Compare a merged model with base plus adapter, here and in the rwkv package; or with our model in "
        "float64 in each installed runtime.",
    )
    add = parser.add_argument
    add("--merged", required=True, metavar="PTH", help="the model to check")
    add(*BASE_FLAGS, metavar="MODEL", help="the base of the merge")
    add(
        *ADAPTER_FLAGS,
        action=ScaledFiles,
        nargs="+",
        default=[],
        metavar="FILE[=SCALE]",
        help="the adapters in the order of the merge, or folders of runs, with its scales",
    )
    add_source_flags(parser)
    add("--state", metavar="FILE", help="its time states, if in another file (merge_bone.py --state_output)")
    add("--any_base", action="store_true", help="do not compare the base with the one that the adapter names")
    runtimes = (
        "print how far the logits of each installed runtime are from ours in float64, for which that needs memory"
    )
    add("--runtimes", action="store_true", help=runtimes)
    add(
        "--gguf_types",
        nargs="*",
        choices=GGUF_TYPES,
        default=["f32", "f16"],
        help="types of GGUF for llama.cpp (default f32 f16; none: leave it out)",
    )
    length = "length of the random token sequence (default 64)"
    add("--tokens", type=up_to(MOST_TOKENS, positive), default=64, help=length)
    return parser.parse_args(argv)


def inspect_flags(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rwkv-peft inspect",
        description="Describe a file or folder: a model, merged or not, an adapter, states; ours or another tool's.",
    )
    add = parser.add_argument
    add("file", help="a .pth, .safetensors, .st, .gguf, or the folder of a run, of peft or of a model")
    add_source_flags(parser)
    return parser.parse_args(argv)


def convert_flags(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rwkv-peft convert",
        rules=CONVERT_RULES,
        description="Convert models, states and adapters to and from the formats of other tools. The names of input "
        "and output choose the formats.",
    )
    add = parser.add_argument
    add(
        "input",
        help="a file or folder of one of those formats, flash-linear-attention's folder of an RWKV-7, the folder of a "
        "run, or of peft",
    )
    add(
        "output",
        help=".pth, .safetensors / .st / .state, .gguf, or a folder (by --to, a slash at its end, or no ending)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="dtype of the output's tensors; default fp16 for models in .st, which web-rwkv needs, else keep",
    )
    add(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer whose vocabulary goes into a GGUF or a Hugging Face folder: world, bytes, or a file (default: "
        "that of the run whose folder holds the model, or by the model's vocabulary, 65536: world, 257: bytes)",
    )
    add("--gguf_type", choices=GGUF_TYPES, help="type of a GGUF's large matrices (default f16)")
    add(
        "--bone_parameter",
        choices=("disha", "bone"),
        help="name of Bone's tensors in RWKV-PEFT's files: disha since 2025-02 (default), bone before",
    )
    add(
        "--to",
        choices=("lora", "lightning", "hf", "fla"),
        help="lora: write an adapter as plain LoRA, into a folder (Hugging Face peft), .gguf (llama.cpp), .pth "
        "(RWKV-PEFT) or .safetensors; bone exactly, bat-in by its largest singular values, and print the error; "
        "lightning: write bone as the .pth that rwkv_lightning_cuda serves on its --base_model; "
        "hf: write a model into a folder of transformers; fla: write an RWKV-7 into one as flash-linear-attention "
        "has it",
    )
    add(
        "--lora_rank",
        type=positive,
        default=0,
        metavar="N",
        help="rank of a form that is not exact (default twice the adapter's)",
    )
    add_source_flags(parser)
    add(
        *BASE_FLAGS,
        metavar="MODEL",
        help="base of an adapter; its shapes may decide the variant, and the width of bone-mini in RWKV-PEFT's form",
    )
    return parser.parse_args(argv)


def push_flags(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rwkv-peft push",
        description="Push an adapter or a model to a repository of the Hugging Face hub, with a card that says what it "
        "is: the README.md of the run's folder, else one made from the file. Needs `hf auth login`, or HF_TOKEN.",
    )
    add = parser.add_argument
    add("source", metavar="RUN", help="the folder of a run, or a .safetensors or .pth")
    add("repo", type=repository, metavar="NAME/REPO", help="the repository; it is made if missing")
    files = "files of the folder (default: its newest adapter or model, merged model and states)"
    add("--files", nargs="+", metavar="FILE", help=files)
    add("--private", action="store_true", help="make a new repository private")
    message = "message of the commit (default: %(default)s)"
    add("--message", default="Upload with rwkv-peft", metavar="TEXT", help=message)
    add("--dry_run", action="store_true", help="only say what would be pushed")
    return parser.parse_args(argv)


def prove_flags(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="rwkv-peft prove",
        rules=PROVE_RULES,
        usage="rwkv-peft prove [-h] RUN [--output FILE] …, or rwkv-peft prove FILE --url URL …",
        description="Write a proof of a run: prompts, and the greedy answers to them. With --url, ask an endpoint "
        "by a proof, and name what is wrong there: tokenizer, sampling, model file, adapter, quantization, template, "
        "stop. A proof is a script, which asks by itself on machines that have nothing but Python.",
    )
    add = parser.add_argument
    add("source", metavar="RUN|FILE", help="the folder of a run to write a proof of, or with --url a proof")
    add("--output", metavar="FILE", help="the proof to write (default: proof.py in RUN)")
    add("--load_model", metavar="FILE", help="the run's base, if it has moved")
    add("--data_file", metavar="FILE", help="rows to ask, if the run's own have moved")
    add("--rows", type=positive, default=8, help="the most prompts of rows (default 8)")
    add("--max_tokens", type=positive, default=48, help="the most tokens of an answer (default 48)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    add_endpoint_flags(parser)
    return parser.parse_args(argv)
