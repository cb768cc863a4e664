"""What a DataConfig says of rows: the settings by which they become documents. Without torch, so that the page's
preview starts at once."""

import re
from pathlib import Path

from ..checkpoints.readable import require_readable
from ..cli.errors import UserError
from ..config import DATA_TYPES, DataConfig
from .encoding import EncodeSettings
from .rows import JSON_ENDINGS, KINDS

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def settings_of(config: DataConfig) -> EncodeSettings:
    """The settings by which the rows of a DataConfig become documents. Raises UserError for too many or too few fields,
    and for rows that are missing."""
    DATA_TYPES[config.data_type].check_fields(config.sft_field)
    settings = EncodeSettings(
        config.tokenizer,
        fields=config.sft_field,
        think=config.sft_think,
        think_labels=config.think_labels,
        clean_turns=config.clean_turns,
        tool_form=config.tool_form,
        speaker=config.sft_as,
        turns_in_text=config.turns_in_text,
        encoding=config.encoding,
        document_end=config.document_end,
        skip_bad_rows=config.skip_bad_rows,
        too_long=config.sft_long,
        command="train" if config.data_type == "sft" else config.data_type,
        max_tokens=0 if config.dataload == "get" else config.longest,
        end_token=not config.of_prompts,
    )
    refuse_hub_name(config)
    path = Path(config.path)
    if not path.is_dir():
        require_readable(
            path,
            f"{path}: no such file; --data_type {config.data_type} takes {KINDS}. Nothing is downloaded: "
            "of a data set on Hugging Face give the files of its rows",
            again=True,
        )
    return settings


def refuse_hub_name(config: DataConfig) -> None:
    """Raise UserError for missing rows that are named like a data set on Hugging Face's hub."""
    path = Path(config.path)
    named = HUB_NAME.fullmatch(config.path) and not config.path.endswith(JSON_ENDINGS)  # of files that will be written
    if config.of_rows and named and not path.parent.exists():
        raise UserError(
            f"{path}: no such file, and nothing is downloaded; if it is a data set on Hugging Face, `hf "
            f"download {path} --repo-type dataset --local-dir {path.name}` fetches it; give that folder, "
            "or the file of its rows"
        )
