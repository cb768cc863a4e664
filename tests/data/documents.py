"""Documents of a data set, and the segments that they are made of, as text."""

from rwkv_peft.data.tokenizer import load_tokenizer


def texts(dataset):
    """Each document as (text, the part that counts)."""
    tokenizer, result = load_tokenizer("bytes"), []
    for i, document in enumerate(dataset):
        start = dataset.start(i)
        mask = [1] * len(document) if dataset.mask is None else dataset.mask[start : start + len(document)]
        result.append(
            (
                tokenizer.decode(document.tolist()),
                tokenizer.decode([int(token) for token, counts in zip(document, mask) if counts]),
            )
        )
    return result


def text(segments):
    return "".join(words for words, _ in segments)


def counted(segments):
    return "".join(words for words, counts in segments if counts)
