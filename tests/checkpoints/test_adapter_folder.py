"""The folder of an adapter is whole, of one adapter, or refused."""

import os

import pytest

from rwkv_peft.checkpoints.peft_folder import CONFIG, TENSORS, is_adapter_folder, read_config, replacing
from rwkv_peft.cli.errors import UserError


def write(folder, word):
    with replacing(folder) as (config, tensors):
        config.write_text('{"peft_type": "' + word + '"}')
        tensors.write_text(word)


def test_a_kill_between_the_names_leaves_no_folder_of_two_halves(tmp_path, monkeypatch):
    write(tmp_path, "old")
    rename = os.replace

    def killed(source, target):
        if os.path.basename(target) == CONFIG:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        write(tmp_path, "new")
    assert not is_adapter_folder(tmp_path)
    with pytest.raises(UserError, match="has no adapter_config.json"):
        read_config(tmp_path)
    write(tmp_path, "new")
    assert read_config(tmp_path) == {"peft_type": "new"} and (tmp_path / TENSORS).read_text() == "new"


def test_a_writing_that_fails_leaves_the_old_folder(tmp_path):
    write(tmp_path, "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path) as (config, _):
        config.write_text("{}")
        raise ZeroDivisionError
    assert read_config(tmp_path) == {"peft_type": "old"} and sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "no settings, but a list")])
def test_settings_that_cannot_be_read_are_refused(tmp_path, text, message):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)
