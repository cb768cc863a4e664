"""Tells how the model of a run is asked as its rows ask, if these are no chats."""

from pathlib import Path

from .recorded import CLEAN, content_of, runs_beside
from .templates import LAYOUTS

OPENING = "opening"  # of answers: an entry of a run's config.json
PROMPTS = {last: f"{openings[0]} …\\n\\n{last}" for openings, last in LAYOUTS if last != "Assistant:"}


def prompt_beside(*paths: str | Path | None) -> str:
    """The prompt, with escapes, in the layout of the rows of the first run whose folder is, or holds, one of these
    paths; "" if they are chats, or their layout is not known."""
    found = filter(None, map(content_of, runs_beside(*paths)))
    opening = next((content.get(OPENING) for content in found if isinstance(content, dict)), None)
    return PROMPTS.get(opening, "") if isinstance(opening, str) else ""


def flags_beside(*paths: str | Path | None) -> str:
    """The flags by which generate asks as the rows of that run ask: --prompt, or --chat if prompt_beside knows none."""
    prompt = prompt_beside(*paths)
    return f"--escapes --prompt '{prompt}'" if prompt else "--chat"


def clean_beside(*paths: str | Path | None) -> bool:
    """Whether the turns of that run's rows are cleaned, which they are by default."""
    found = (content.get("data") for content in map(content_of, runs_beside(*paths)) if isinstance(content, dict))
    settings = next((each for each in found if isinstance(each, dict)), {})
    return settings.get(CLEAN) is not False


def note_on_chats(*paths: str | Path | None) -> str:
    """A note to who chats with a model that learned another layout; "" if there is no reason for one."""
    prompt = prompt_beside(*paths)
    return prompt and (
        "note: the rows of this run ask in another layout than a chat, in which it may answer as if it had learned "
        f"nothing; a prompt in theirs is '{prompt}'"
    )
