"""Text about a data set: its rows, the training settings that fit it, the opening of its answers, and documents and
samples with marks around the parts that count in the loss."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from ..cli.errors import UserError, in_line, quoted, short, some, visible
from ..cli.names import HERMES
from ..cli.parser import counted
from .binidx import BinidxDataset, counting
from .chat import QUOTE, THINKING, TURN_END, opening_within, stops_of
from .encoding import MARK, UNREAD, Totals
from .exports import CHATS_OF, LEFT_OUT
from .masks import undesirable
from .recorded import Vocabulary, vocabulary_of
from .tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from .samples import Samples  # by torch, which preprocess does without

END = "<end>"
LONG, RUNS = 1000, 20  # a piece of more characters loses its middle, and a document or sample of more pieces, too
DOCUMENTS, TOKENS = 20, 4096  # documents in which openings are looked for, and tokens of each


def describe(dataset: BinidxDataset, totals: Totals | None = None) -> str:
    """Describe a BinidxDataset in several lines; totals are preprocess's counts of its rows."""
    sizes, tokens = np.asarray(dataset.sizes), len(dataset.tokens)
    documents = counted(len(sizes), "document")
    lines = [f"{dataset.prefix}: {documents}, {tokens:,} tokens ({dataset.dtype.name})"]
    if dataset.mask is not None:
        lines.append(f"{counting(dataset.mask):,} tokens count in the loss ({dataset.mask_path}, which training reads)")
    if dataset.weights is not None:
        lines.append(f"rows weigh {dataset.weights.min():g} to {dataset.weights.max():g} ({dataset.weights_path})")
    if totals is not None:
        lines += laid_out(totals) + left_out(totals)
    return "\n".join(lines + lengths(sizes))


def laid_out(totals: Totals) -> list[str]:
    """The lines on rows with thinking and without, for think "on", and notes on rows that may be mistakes."""
    counts = totals.counts
    lines = [f"note: {note.words}" for note in totals.notes]
    lines += [f"note: read {note}; the first row: {in_line(short(text))}" for note, text in totals.readings.items()]
    chats = [f"{name} ({counted(number, 'chat')})" for name, number in under(totals, CHATS_OF)]
    if chats:
        ignored = [f"{number:,} {what}" for what, number in under(totals, LEFT_OUT)]
        lines.append(f"note: read {', '.join(chats)}" + f"; left out: {', '.join(ignored)}" * bool(ignored))
    if counts["thinking"]:
        lines.append(
            f"{counted(counts['thinking'], 'row')} with thinking, {counts['at_once']:,} without (<think></think)"
        )
    for count, what in (
        (counts["wordless"], "with an empty answer, which teaches the model to say nothing there"),
        (counts["unanswered"], "without an answer, so that none of their tokens counts in the loss"),
        (counts["unfinished"], "whose last turn is not the model's, and so is not learned"),
        (counts["repeated"], "the same as an earlier one, which therefore trains more often"),
        (
            counts["tagged"],
            "whose words list tools in <tools>, and which is laid out in --tool_form g1, without what they say of tags",
        ),
        (
            counts["turns"],
            "in which a text or a question holds turns of a chat, such as User: … Assistant: …, and counts as one; "
            "--turns_in_text auto makes turns of them, of which only the answers count",
        ),
        (
            counts["forging"],
            f"in which a text begins as a tool's result does, and is quoted ({QUOTE}Function output:), because results "
            "have the role tool; give it that role, or add --clean_turns 0",
        ),
    ):
        if count:
            lines.append(f"note: {counted(count, 'row')} {what}")
    return lines + marks(totals) + unread_fields(totals)


def marks(totals: Totals) -> list[str]:
    """The note, as a list, on marks of other models in the rows' words; [] if there are none."""
    names = under(totals, MARK)
    if not names:
        return []
    listed = some([f"{quoted(name)} ({counted(number, 'row')})" for name, number in names], 20)
    remedies = {
        "sft_think": "--think on (train.py: --sft_think on) lays a thinking out",
        "tool_form": "--tool_form hermes is the form of such calls",
    }
    remedy = " and ".join(remedies[flag] for flag, _ in mark_offers(totals)) or "take out what is no text"
    return [f"note: learned as text: {listed}; {remedy}"]


def mark_offers(totals: Totals) -> list[tuple[str, str]]:
    offered = (("thought", ("sft_think", "on")), ("<tool", ("tool_form", HERMES)))
    return [offer for part, offer in offered if any(part in name for name, _ in under(totals, MARK))]


def offers(totals: Totals) -> list[tuple[str, str]]:
    """Flags of train.py with values that would change how rows are read."""
    thinking = any(name in THINKING for name, _ in under(totals, UNREAD))
    return [
        *(offer for note in totals.notes for offer in note.offers),
        *totals.bad.offers,
        *([("sft_think", "on")] if thinking else []),
        *mark_offers(totals),
        *([("turns_in_text", "auto")] if totals.counts["turns"] else []),
    ]


def unread_fields(totals: Totals) -> list[str]:
    """The note, as a list, on fields with a text in no document; [] if there are none."""
    names = under(totals, UNREAD)
    if not names:
        return []
    listed = some([f"{name} ({counted(number, 'row')})" for name, number in names], 20)
    remedies = ["preprocess --template lays out any field"]
    remedies += ["--think (train.py: --sft_think) thinking"] * any(name in THINKING for name, _ in names)
    return [f"note: not read: {listed}; {', and '.join(remedies)}"]


def under(totals: Totals, prefix: str) -> list[tuple[str, int]]:
    """The counts whose names begin so, (the rest of the name, the count), the most frequent first."""
    return [(name.removeprefix(prefix), n) for name, n in totals.counts.most_common() if n and name.startswith(prefix)]


def left_out(totals: Totals) -> list[str]:
    """The lines on rows that were not written, or not whole."""
    lines = list(totals.bad.lines(" left out")) if totals.bad else []
    words = {
        "empty": ("empty row", "left out"),
        "too_long": ("row", "too long, left out"),
        "shortened": ("row", "too long, shortened"),
        "cut": ("text", "longer than a row, cut into several"),
        "equal": ("pair", "of equal answers left out"),
        "dropped": ("row", "the same as an earlier one, dropped"),
        "bare": ("row", "without a prompt or an answer, left out"),
        "feedback": ("row", "of feedback that this kind of rows does not learn from, left out"),
    }
    found = ((totals.counts[name], *both) for name, both in words.items())
    return lines + [f"{counted(number, word)} {what}" for number, word, what in found if number]


def lengths(sizes: np.ndarray) -> list[str]:
    """The lines on document lengths, and a --ctx_len with room for 95 % of them (16 to 4096)."""
    half, most = (int(np.percentile(sizes, part, method="higher")) for part in (50, 95))
    ctx_len = fitting(sizes)
    longer = int((sizes > ctx_len + 1).sum())
    cut = f"; {counted(longer, 'document')} {'is' if longer == 1 else 'are'} longer, and cut there" if longer else ""
    return [
        f"half of them have at most {counted(half, 'token')}, 95 % at most {most:,}, the longest has {sizes.max():,}",
        f"a start: --ctx_len {ctx_len}{cut}",
    ]


def fitting(sizes: np.ndarray) -> int:
    """A --ctx_len with room for 95 % of documents with `sizes` tokens (16 to 4096)."""
    most = int(np.percentile(sizes, 95, method="higher"))
    return min(max(1 << max(most - 2, 0).bit_length(), 16), 4096)


def opening_of(dataset: BinidxDataset, vocabulary: Vocabulary | None) -> str:
    """The text that opens an answer in the first documents, such as "Assistant:" or "Assistant: <think"; "" if it is
    unknown, or their tokenizer is not available."""
    tokenizer = at_hand(vocabulary) if vocabulary is not None else None
    if tokenizer is None:
        return ""
    found = (opening_of_document(dataset, index, tokenizer) for index in range(min(len(dataset), DOCUMENTS)))
    return next(filter(None, found), "")


def opening_of_document(dataset: BinidxDataset, index: int, tokenizer: Tokenizer) -> str:
    tokens, start = dataset[index], dataset.start(index)
    learned = np.ones(len(tokens)) if dataset.mask is None else dataset.mask[start : start + len(tokens)]
    if not learned.any():
        return ""
    if learned[0]:  # a text, whose prompt counts too
        return opening_within(tokenizer.decode(tokens[:TOKENS].tolist()))
    first = int(learned.argmax())
    prompt = tokenizer.decode(tokens[max(0, first - TOKENS) : first].tolist())
    return prompt.rpartition(TURN_END)[2] if stops_of(prompt) else ""


def at_hand(vocabulary: Vocabulary) -> Tokenizer | None:
    """Load the tokenizer of a Vocabulary; None if its file or package is gone, or has changed."""
    try:
        tokenizer = load_tokenizer(vocabulary.name)
    except UserError:
        return None
    return tokenizer if vocabulary_of(tokenizer).hash == vocabulary.hash else None


def show_documents(dataset: BinidxDataset, number: int, tokenizer: Tokenizer) -> str:
    """The first `number` documents of a BinidxDataset, one below the other."""
    blocks: list[str] = []
    for index in range(min(number, len(dataset))):
        tokens = dataset[index]
        blocks.append(block(f"document {index + 1}", tokens, counted_in(dataset, index), tokenizer))
    return "\n".join(blocks)


def counted_in(dataset: BinidxDataset, index: int) -> np.ndarray:
    """bool (n,), true for each token of a document that counts in the loss."""
    start, size = dataset.start(index), int(dataset.sizes[index])
    if dataset.mask is None:
        return np.ones(size, dtype=bool)
    return np.asarray(dataset.mask[start : start + size] != 0)


def show_samples(samples: "Samples", number: int, tokenizer: Tokenizer) -> str:
    """The first `number` samples of a run, in the order in which it reads them."""
    blocks = []
    for n in range(min(number, len(samples))):
        sample = samples[n]
        rows = sample if isinstance(sample, list) else [sample]
        for part, (tokens, mask) in enumerate(rows, start=1):
            title = f"sample {n + 1}" + (f", document {part}" if len(rows) > 1 else "")
            title += ", undesirable" if undesirable(mask) else ""
            counts = np.concatenate([[False], mask.numpy() != 0])  # nothing predicts the first token
            blocks.append(block(title, tokens.numpy(), counts, tokenizer))
    return "\n".join(blocks)


def block(title: str, tokens: np.ndarray, counted: np.ndarray, tokenizer: Tokenizer) -> str:
    """A heading, and tokens (n,) as text, with [[ ]] around those at which counted (n,) is true."""
    parts = [f"[[{text}]]" if counts else text for text, counts in pieces(tokens, counted, tokenizer)]
    return f"== {title}: {len(tokens)} tokens, {int(counted.sum())} count\n{''.join(parts)}"


def pieces(tokens: np.ndarray, counted: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of tokens as [(text, counts)]; long pieces, and long lists of them, lose their middle."""
    found = [
        (shortened(plain_text([token for token, _ in run], tokenizer)), bool(counts))
        for counts, run in groupby(zip(tokens.tolist(), counted.tolist()), key=lambda pair: pair[1])
    ]
    if len(found) > RUNS:
        found[RUNS // 2 : -(RUNS // 2)] = [(f"\n… {len(found) - RUNS:,} pieces are not shown …\n", False)]
    return found


def shortened(text: str) -> str:
    """A text, without its middle if it is longer than LONG."""
    if len(text) <= LONG:
        return text
    half = LONG // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters are not shown …\n{text[-half:]}"


def plain_text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of a list of tokens, with END for the tokenizer's end token, and other special tokens by their names."""
    names = {number: name for name, number in tokenizer.special.items()}
    runs = groupby(tokens, key=lambda token: END if token == tokenizer.end_id else names.get(token, ""))
    return "".join(name * len(list(run)) if name else visible(tokenizer.decode(list(run))) for name, run in runs)
