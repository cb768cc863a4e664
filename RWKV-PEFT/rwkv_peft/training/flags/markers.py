"""Read --mask_id and --mask_end_id: token ids, or RWKV-PEFT's JSON of two markers."""

import argparse
import json
from types import MappingProxyType
from typing import Any

from ...cli import count
from ...errors import UserError, short, told

UNSET = MappingProxyType({"mask0": "0", "mask1": "1"})  # what RWKV-PEFT's scripts pass if no marker is meant


def marker(text: str) -> int | dict[str, Any]:
    """Parse an argument (an argparse type) -> a token id, or the JSON object {"mask0": …, "mask1": …} as a dict."""
    if not text.lstrip().startswith("{"):
        return count(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{short(text)!r} is not JSON ({told(error)})") from error
    if set(value) != set(UNSET):
        raise argparse.ArgumentTypeError(f"{short(text)!r} has other keys than mask0 and mask1, which are due")
    return value


def markers_of(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return {"mask_id", "mask_end_id": token ids} if --mask_id is the JSON, else {}. Its mask1 opens what counts, its
    mask0 closes it. Raises UserError if other markers are given too."""
    given = [item for item in args.mask_id or () if isinstance(item, dict)]
    if not given:
        return {}
    if len(args.mask_id) > 1 or args.mask_end_id:
        named = short(json.dumps(given[0]))
        raise UserError(f"--mask_id {named} names both markers; leave other ids and --mask_end_id out")
    texts = given[0]
    if texts == UNSET:
        return {"mask_id": (), "mask_end_id": ()}
    tokenizer = tokenizer_of(args)
    return {"mask_id": token_ids(texts["mask1"], tokenizer), "mask_end_id": token_ids(texts["mask0"], tokenizer)}


def tokenizer_of(args: argparse.Namespace) -> str:
    """The name of the data's tokenizer: --tokenizer, or for token files the one that is recorded beside them, if
    any."""
    from ...data.recorded import recorded_of_data

    recorded = None if args.data_type != "binidx" else recorded_of_data(args.data_file)
    return args.tokenizer if recorded is None else recorded.name


def token_ids(marked: object, tokenizer: str) -> tuple[int, ...]:
    """The ids of one value of the JSON: a text, a token id or a list of ids. Raises UserError for anything else."""
    if isinstance(marked, str):
        from ...data.tokenizer import load_tokenizer

        return tuple(load_tokenizer(tokenizer).encode(marked))
    ids = marked if isinstance(marked, list) else [marked]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise UserError(f"--mask_id: {short(json.dumps(marked))} is neither a text nor token ids")
    return tuple(ids)
