"""Files as other libraries write them: folders of datasets, and a tokenizer.json over each kind of model."""

import json

MODELS = {
    "WordLevel": {"vocab": {"a": 0}, "unk_token": "[UNK]"},
    "WordPiece": {
        "vocab": {"a": 0},
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    },
    "Unigram": {"vocab": [["a", -1.0]], "unk_id": None, "byte_fallback": False},
    "BPE": {"vocab": {"a": 0}, "merges": [], "unk_token": "x"},
}


def json_file(folder, kind, **model):
    """A tokenizer.json over one kind of model."""
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    content = {"version": "1.0", "added_tokens": [], "model": {"type": kind} | MODELS[kind] | model, **rest}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder / "tokenizer.json")


def save_folder(folder, table, **state):
    """A folder as datasets.save_to_disk writes it."""
    from pyarrow import ipc

    folder.mkdir(parents=True)
    with ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "a", "_split": "train"} | state
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": {}}))
    return folder
