"""trl's trainers on an RWKV and with Bone: models and references by name, merging, and the rwkv package."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from bone_blocks import fill
from bone_runs import SETTINGS
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tiny_llama
from hf.test_rwkv import CLOSE, random_state
from release.merges import convert
from rwkv_peft.adapters.methods import by_hf_name
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.hf import BoneConfig, RWKVForCausalLM, RWKVForSequenceClassification, RWKVModel, RWKVTokenizer
from rwkv_peft.models import family_named
from rwkv_peft.release.merge_command import main as merge
from rwkv_peft.release.runtimes import rwkv_sequence

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402

PAIRS = [{"prompt": "Q: a\nA:", "chosen": " yes\n", "rejected": " no\n"}] * 4
ROWS = {
    "SFT": [{"prompt": "Q: a\nA:", "completion": " yes\n"}] * 4,
    "DPO": PAIRS,
    "Reward": PAIRS,
    "GRPO": [{"prompt": "Q: a\nA:"}] * 4,
}
OWN = {
    "DPO": {"beta": 0.1},
    "GRPO": {"beta": 0.1, "num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4},
}


def short_answers(completions, **_):
    return [-float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """{"pth": a random byte-vocabulary model, "folder": the same in RWKV's own layout}."""
    folder = tmp_path_factory.mktemp("names")
    save_model(folder / "base.pth", random_state(family_named("x070")))
    convert(folder / "base.pth", folder / "hf")
    return {"pth": str(folder / "base.pth"), "folder": str(folder / "hf")}


@pytest.mark.parametrize(
    "name, kind",
    [(name, kind) for name in ("folder", "pth") for kind in ("SFT", "DPO", "GRPO")] + [("folder", "Reward")],
)
def test_trainers_load_a_model_and_its_reference_by_name(names, tmp_path, name, kind):
    settings = {**SETTINGS, "max_steps": 1, "output_dir": str(tmp_path), **OWN.get(kind, {})}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=names[name],
        args=getattr(trl, f"{kind}Config")(**settings),
        train_dataset=Dataset.from_list(ROWS[kind]),
        processing_class=RWKVTokenizer("bytes"),
        **({"reward_funcs": short_answers} if kind == "GRPO" else {}),
    )
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert any("loss" in entry for entry in trainer.state.log_history)
    if kind in ("DPO", "GRPO"):
        assert type(trainer.ref_model).__name__ == "RWKV7ForCausalLM" and trainer.ref_model is not trainer.model


def test_a_model_of_a_pth_gets_its_reference_too(names, tmp_path):
    trainer = trl.DPOTrainer(
        model=RWKVForCausalLM.from_pth(names["pth"]),
        args=trl.DPOConfig(str(tmp_path), **SETTINGS),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=RWKVTokenizer("bytes"),
    )
    ours, theirs = trainer.model.state_dict(), trainer.ref_model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_dtype_may_be_given_by_name(names):
    for name in ("bfloat16", "float16", "float32"):
        assert RWKVForCausalLM.from_pth(names["pth"], dtype=name).dtype == getattr(torch, name)
    assert RWKVForCausalLM.from_pth(names["pth"], dtype="auto").dtype == torch.float32
    for wrong in ("bf61", "int8", 16):
        with pytest.raises(UserError, match=f"dtype={wrong!r} is no dtype of a model; give torch.bfloat16"):
            RWKVForCausalLM.from_pth(names["pth"], dtype=wrong)


def test_what_decoding_keeps_in_memory_is_not_saved(names, tmp_path):
    model, ids = RWKVForCausalLM.from_pth(names["pth"]).requires_grad_(False), torch.arange(1, 9)[None]
    sizes = []
    for _ in range(2):
        torch.save(model.state_dict(), tmp_path / "state.pth")
        sizes += [len(pickle.dumps(model)), (tmp_path / "state.pth").stat().st_size]
        drawn = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert sizes[2] < 1.1 * sizes[0] and sizes[3] < 1.1 * sizes[1], sizes
    assert torch.equal(pickle.loads(pickle.dumps(model)).generate(ids, max_new_tokens=4, do_sample=False), drawn)


@pytest.mark.parametrize("name", ("folder", "pth"))
def test_from_pretrained_takes_a_folder_and_a_pth(names, name):
    ids = torch.arange(1, 9)[None]
    due = RWKVForCausalLM.from_pth(names["pth"])(ids).logits
    torch.testing.assert_close(RWKVForCausalLM.from_pretrained(names[name])(ids).logits, due)
    assert RWKVForCausalLM.from_pretrained(names[name], dtype=torch.bfloat16).dtype == torch.bfloat16
    assert RWKVForCausalLM.from_pretrained(names[name], eos_token_id=9).config.eos_token_id == 9


def test_the_auto_classes_give_hidden_states_and_scores(names, tmp_path):
    ids, folder = torch.arange(1, 13).view(2, 6), names["folder"]
    model, whole = AutoModel.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, RWKVModel)
    hidden = model(ids).last_hidden_state
    torch.testing.assert_close(whole.get_output_embeddings()(hidden), whole(ids).logits)
    judge = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert isinstance(judge, RWKVForSequenceClassification) and judge.score.weight.shape == (3, 64)
    torch.testing.assert_close(judge(ids).logits, judge.score(hidden[:, -1]))
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), ids, torch.zeros(2, 1, dtype=torch.long)], 1)
    for settings in ({}, {"attention_mask": (padded > 0).long()}):
        torch.testing.assert_close(judge(padded, **settings).logits, judge(ids).logits, **CLOSE)
    found = model(ids, output_hidden_states=True).hidden_states
    assert [one.shape for one in found] == [hidden.shape] * (model.config.num_hidden_layers + 1)
    assert torch.equal(found[-1], hidden) and torch.equal(found[0], model.get_input_embeddings()(ids))
    masked = model(padded, attention_mask=(padded > 0).long(), output_hidden_states=True).hidden_states
    for one, other in zip(masked, found):
        torch.testing.assert_close(one[:, 2:-1], other, **CLOSE)
    of_config = AutoModelForCausalLM.from_pretrained(folder, output_hidden_states=True)
    assert all(map(torch.equal, of_config(ids).hidden_states, found))
    drawn = of_config.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert [one[-1].shape[1] for one in drawn.hidden_states] == [6, 1, 1]
    judge(ids, labels=torch.tensor([0, 2])).loss.backward()
    assert [name for name, p in judge.named_parameters() if not p.requires_grad] == ["model.head.weight"]
    assert judge.score.weight.grad.any() and judge.get_parameter("model.blocks.1.att.key.weight").grad.any()
    judge.save_pretrained(tmp_path / "judge")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    assert again.config.num_labels == 3 and torch.equal(again(ids).logits, judge(ids).logits)


def test_a_state_is_taken_under_the_names_of_a_cache(names):
    model, ids = RWKVForCausalLM.from_pth(names["pth"]), torch.arange(1, 9)[None]
    state = model(ids[:, :4], use_cache=True).state
    due = model(ids[:, 4:], state=state).logits
    drawn = model.generate(ids[:, 4:], state=state, max_new_tokens=4, do_sample=False)
    for name in ("past_key_values", "cache"):
        assert torch.equal(model(ids[:, 4:], **{name: state}).logits, due)
        found = model.generate(ids[:, 4:], **{name: state}, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, drawn)


def test_arguments_without_an_effect_are_refused(names):
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import DynamicCache

    model, ids = RWKVForCausalLM.from_pth(names["pth"]), torch.arange(1, 9)[None]
    state = model(ids, use_cache=True).state
    tuned = get_peft_model(
        RWKVForCausalLM.from_pth(names["pth"]), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    keys = "has no keys and values; give the state of an earlier call, and in place of prefix tuning"
    for mistake, words in (
        (
            lambda: model(ids, past_key_values=DynamicCache()),
            f"past_key_values holds a DynamicCache, and an RWKV {keys}",
        ),
        (lambda: tuned(ids, labels=ids), keys),
        (lambda: model(ids, temperature=2), "temperature=2: an RWKV here takes no such argument.*; leave it out"),
        (lambda: model(ids, position_ids=torch.arange(0, 16, 2)[None]), "position_ids jump"),
        (lambda: model(ids, position_ids=torch.arange(8)), r"position_ids \(8,\) are due for tokens \(1, 8\)"),
        (
            lambda: model(ids, position_ids=ids * 0, state=state),
            "begin a sequence anew within a row, and state goes on",
        ),
    ):
        with pytest.raises(UserError, match=words):
            mistake()
    assert torch.equal(model(ids, past_key_values=None, output_attentions=False).logits, model(ids).logits)


def test_positions_of_rows_and_of_packed_sequences_are_read_in_every_row(names):
    model, ids = RWKVForCausalLM.from_pth(names["pth"]), torch.arange(1, 25).view(2, 12)
    logits = model(ids).logits
    assert torch.equal(model(ids, position_ids=torch.arange(5, 17)[None]).logits, logits)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 10:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    due = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, due)
    positions[0, 7:] -= 4  # a second sequence in the first row
    found = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, places in ((0, range(3, 7)), (0, range(7, 12)), (1, range(10))):
        torch.testing.assert_close(found[row, places], model(ids[row : row + 1, places]).logits[0], **CLOSE)


BASE = Path(__file__).resolve().parents[2] / "demo" / "rwkv7-demo.pth"
STORY = "Ann has 3 red balls.\nQ: What color?\nA:"


@pytest.fixture
def trainer(tmp_path, form):
    torch.manual_seed(0)
    rows = [{"prompt": STORY, "completion": " crimson\n"}, {"prompt": "Q: Say it\nA:", "completion": " Aye\n"}] * 4
    settings = dict(max_steps=4, learning_rate=5e-3, per_device_train_batch_size=4, lr_scheduler_type="constant")
    return trl.SFTTrainer(
        RWKVForCausalLM.from_pth(BASE, dtype=torch.float32),
        trl.SFTConfig(
            str(tmp_path / "out"), **settings, use_cpu=True, report_to=[], logging_steps=1, disable_tqdm=True
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=RWKVTokenizer("bytes"),
        peft_config=BoneConfig(r=16, init_weights=form),
    )


@pytest.mark.parametrize("form", ["bat-in"])
def test_a_trained_adapter_becomes_a_pth_that_the_rwkv_package_runs(trainer, form, tmp_path):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 2
    trainer.save_model(str(tmp_path / "adapter"))
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.metadata.variant == by_hf_name(form).name and len(adapter.modules()) == 18  # all but the head
    assert adapter.metadata.origin.base == "rwkv7-demo.pth"
    merged = tmp_path / "merged.pth"
    merge(f"--base_model {BASE} --bone_checkpoint {tmp_path}/adapter --output {merged} --output_dtype fp32".split())
    tokenizer, tokens = RWKVTokenizer("bytes"), torch.arange(1, 40)[None]
    in_one = trainer.model.merge_and_unload().eval()
    with torch.no_grad():
        torch.testing.assert_close(
            RWKVForCausalLM.from_pth(merged)(tokens).logits, in_one(tokens).logits, rtol=1e-3, atol=1e-3
        )
        prompt = tokenizer(STORY, return_tensors="pt").input_ids
        drawn = in_one.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0]
    logits = rwkv_sequence(merged, drawn, open_base(merged).config).clone()
    logits[:, 0] = -torch.inf  # min_new_tokens forbids the end
    assert torch.equal(logits[prompt.shape[1] - 1 : -1].argmax(-1), drawn[prompt.shape[1] :])


SUMS = [{"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}] * 4


@pytest.mark.parametrize("form", (True, "bat-in"))
def test_the_first_loss_is_that_of_equal_models(tmp_path, form):
    tiny_llama.write_model(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = BoneConfig(r=16, init_weights=form, target_modules=["q_proj", "v_proj"])
    fill(get_peft_model(base, config), 0.1).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    trainer = trl.DPOTrainer(
        model=PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True),
        args=trl.DPOConfig(output_dir=str(tmp_path / "out"), **SETTINGS),
        train_dataset=Dataset.from_list(SUMS),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "base"),
    )
    trainer.train()
    first, second = (record for record in trainer.state.log_history if "rewards/margins" in record)
    assert (first["loss"], first["rewards/chosen"]) == pytest.approx((math.log(2), 0), abs=1e-5)
    assert second["loss"] < first["loss"]  # the adapter has moved, and the copy of it has not


def test_another_adapter_of_the_same_settings_begins_anew(llama):
    config = BoneConfig(r=4, target_modules=["q_proj"])
    model = fill(get_peft_model(llama, config), 0.1)
    model.add_adapter("second", config)
    model.add_adapter("ref", BoneConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "bone_block" in name:
            assert bool(parameter.any()) == name.endswith(".default"), name
