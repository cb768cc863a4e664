"""Find held-out rows that are training rows, too: their loss falls as they are learned by heart."""

from collections.abc import Iterator

from ..cli.parser import counted
from .answer_samples import RowSamples
from .samples import DocumentSamples, Samples

MOST = 20_000  # rows of each that are compared, which takes a second


def keys(samples: Samples) -> Iterator[bytes]:
    """Yield the tokens of each row of the first MOST samples of an epoch; of two answers in a row the first."""
    for n in range(min(len(samples), MOST)):
        sample = samples[n]
        documents = sample if isinstance(sample, list) else [sample]
        for tokens, _ in documents[:1] if isinstance(samples, RowSamples) else documents:
            yield tokens.numpy().tobytes()


def leaked(training: Samples, held_out: Samples) -> list[str]:
    """Return a note, as a list, if some held-out rows are training rows; [] for streams of text, which have no rows."""
    if not isinstance(training, DocumentSamples) or not isinstance(held_out, DocumentSamples):
        return []
    known, asked = set(keys(training)), list(keys(held_out))
    if not (number := sum(key in known for key in asked)):
        return []
    return [
        f"note: {number:,} of {counted(len(asked), 'held-out row')} {'is a' if number == 1 else 'are'} training "
        f"{'row' if number == 1 else 'rows'} too, so that the validation loss tells less of other rows; preprocess "
        "--drop_duplicates leaves repeated rows out, or take them out of one of two files"
    ]
