"""A run that tokenizes its rows while it reads them, and goes on."""

from data.test_stream import save_parquet
from training.runs import metrics


def test_a_run_streams_and_goes_on(train, files):
    rows = save_parquet(files / "rows")
    flags = ("--data_file", str(rows), *"--data_type sft --tokenizer bytes --stream 20 --precision fp32".split())
    flags += ("--load_model", "", *"--n_layer 1 --n_embd 32 --vocab_size 257 --head_size 16 --peft none".split())
    out, _ = train("stream", *flags, "--epoch_count", "1")
    assert "70 rows of 2 files, tokenized as they are read, and shuffled in 3 windows an epoch (--stream 20)" in out
    assert "4 training rows:" in out
    train("stream", *flags, "--resume")
    assert [line["samples"] for line in metrics(files, "stream")] == list(range(1, 9))
