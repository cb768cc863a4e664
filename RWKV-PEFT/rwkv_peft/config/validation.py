"""Settings of a run's validation while it trains, and of questions to its model."""

from dataclasses import dataclass

from ..cli.parser import below_one, count, positive, stop_text
from ..cli.tables import TASKS
from .setting import setting


@dataclass(frozen=True)
class ValidationConfig:
    """Validation runs on val_data and more_val, or on the share val_split of the data, and retain_data is measured with
    it; eval_data and the tasks of lm_eval are questions that the model answers, and answer_rows rows of the data."""

    val_data: str = setting(
        "",
        "data to validate on, read like --data_file; of several the loss of each is told, too",
        nargs="+",
        metavar="PREFIX",
    )
    more_val: tuple[str, ...] = setting(())
    val_split: float = setting(
        0.0, "keep this share of the data, such as 0.01, for validation", type=below_one, metavar="SHARE"
    )
    val_seed: int | None = setting(
        None,
        "seed that draws the samples of --val_split, so that runs with different seeds validate on the same (default: "
        "--random_seed)",
        type=count,
    )
    val_every: int = setting(
        0, "validate after every so many steps, and after the last; 0: after every epoch", type=count
    )
    early_stop: int = setting(0, "end after so many validations without a lower loss; 0: never", type=count)
    retain_data: str = setting(
        "",
        "data whose loss measures what the run forgets, read like --data_file; measured before the first step and "
        "with each validation (even without --val_data); the run does not depend on it",
        metavar="PREFIX",
    )
    answer_rows: int = setting(
        4,
        "answer so many rows of the data, and as many held-out ones, before the first step and after the last, and "
        "show both beside the rows' own answers (rows.jsonl in --proj_dir); 0: none",
        type=count,
    )
    eval_data: str = setting(
        "",
        "also score answers during training: rows of questions as rwkv-peft eval takes them; questions, answers and "
        "scores are written to answers.jsonl in --proj_dir",
        metavar="FILE",
    )
    eval_task: str = setting("jsonl", "their task, as in rwkv-peft eval", choices=tuple(TASKS), metavar="TASK")
    eval_every: int = setting(
        0,
        "ask the questions of --eval_data and --lm_eval after every so many steps, and at the end; 0: after every "
        "epoch",
        type=count,
    )
    eval_limit: int = setting(100, "ask the first so many of them, and of each task of --lm_eval; 0: all", type=count)
    eval_template: str = setting("", "template of a question, as --template of rwkv-peft eval", metavar="NAME")
    eval_max_tokens: int = setting(256, "the most tokens of an answer", type=positive)
    eval_stop: tuple[str, ...] = setting(
        (),
        "texts that end an answer, in addition to the template's own, also to rows (--answer_rows); \\n and \\t are "
        "newline and tab",
        type=stop_text,
        metavar="TEXT",
    )
    eval_batch: int = setting(16, "answers written or scored at once, on each device", type=positive)
    lm_eval: tuple[str, ...] = setting(
        (),
        "also score tasks of EleutherAI's lm-evaluation-harness, or groups or patterns of them, during training; the "
        "results are written to lm_eval.jsonl in --proj_dir (sh scripts/setup.sh eval)",
        metavar="TASK",
    )
    lm_eval_include_path: str = setting(
        "", "a folder with tasks of your own, as --include_path of rwkv-peft eval", metavar="DIR"
    )
    lm_eval_num_fewshot: int | None = setting(
        None,
        "solved examples before each question, as --shots of rwkv-peft eval (default: the task's)",
        type=count,
        metavar="N",
    )
