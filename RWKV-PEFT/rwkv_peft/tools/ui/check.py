"""Judges a form as train.py does before it computes anything; it imports torch, and opens the base and the rows.

python -m rwkv_peft.tools.ui.check flag…
"""

from dataclasses import replace

from ...cli.errors import exit_on_user_error
from ...config import RunConfig
from ...data.binidx import BinidxDataset
from ...data.recorded import find_tokenizer
from ...data.row_settings import settings_of
from ...data.rows import held_out_split, parse_split, read_rows
from ...training.flags.request import parse_run
from ...training.run import check


def main(argv: list[str]) -> int:
    """argv, flags of train.py -> 0. Raises UserError for a run that would not begin."""
    request = parse_run(argv)
    check(request, lambda line: None)
    check_data(request.config)
    return 0


def check_data(config: RunConfig) -> None:
    """Raise UserError for data that is missing, or no data: of rows only the first few are read."""
    data, train = config.data, config.train
    split = parse_split(data.sft_split)[0]
    if data.of_rows:
        find_tokenizer(data.tokenizer, config.model.vocab_size)
    for path in (*data.files, train.val_data, *train.more_val, train.retain_data):
        if path and data.of_rows:
            settings_of(replace(data, path=path))
            own = path in data.files
            next(read_rows(path, split if own else held_out_split(path) or split), None)
        elif path:
            BinidxDataset(path)


if __name__ == "__main__":
    exit_on_user_error(main)
