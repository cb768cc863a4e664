"""RWKV as a model of transformers computes what the package's own models do, whatever is padded, packed or saved."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import rwkv_peft as rp
from families import DISTINCT
from release.merges import convert
from release.test_convert import in_fla, write
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.hf import RWKV7Config, RWKVForCausalLM, RWKVTokenizer, register_rwkv
from rwkv_peft.hf.rwkv_config import config_of
from rwkv_peft.models import family_named
from rwkv_peft.models.layout import time_state_shapes
from rwkv_peft.models.state import State
from rwkv_peft.ops.decode.tape import Tape

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PROMPTS = ["Two birds sing. Ann has", "One", "Q: What is there?\nA:"]


def random_state(family, vocab_size=257, n_layer=2, n_embd=64, head_size=32):
    """A state dict of which no part is idle: random changes of a new model."""
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(n_layer, n_embd, vocab_size, head_size=head_size))
    family.init_weights(model)
    return {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in model.state_dict().items()}


@pytest.fixture(scope="module", params=DISTINCT, ids=lambda family: family.name)
def path(request, tmp_path_factory):
    """The path of a random byte-vocabulary model."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    save_model(path, random_state(request.param))
    return path


@pytest.fixture
def model(path):
    return RWKVForCausalLM.from_pth(path)


@pytest.fixture
def ids():
    return torch.randint(1, 257, (5, 9), generator=torch.Generator().manual_seed(1))


def test_a_mask_leaves_tokens_out_wherever_they_are(model, ids):
    """Left and right padding, holes, and a row of nothing: each row computes as its kept tokens do alone."""
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 6:] = mask[2, 2:5] = mask[3] = 0
    mask[4, :2] = mask[4, 7:] = 0
    read = ids[:, :3]
    before = model(read, use_cache=True).state
    for state in (None, before):
        found = model(ids, attention_mask=mask, state=state, use_cache=True)
        for row, kept in enumerate(mask.bool()):
            begun = None if state is None else state.selected(torch.tensor([row]))
            after = found.state.selected(torch.tensor([row]))
            if not kept.any():
                due = State.zeros(model.model.config, 1) if begun is None else begun
            else:
                alone = model(ids[row : row + 1, kept], state=begun, use_cache=True)
                torch.testing.assert_close(found.logits[row, kept], alone.logits[0], **CLOSE)
                due = alone.state
            for layer, expected in zip(after, due):
                torch.testing.assert_close(tuple(layer), tuple(expected), **CLOSE)
    longer = torch.cat([torch.zeros(5, 3, dtype=torch.long), mask], 1)  # a mask over what was read, too
    torch.testing.assert_close(model(ids, attention_mask=longer, state=before).logits, found.logits)


def test_gradients_are_those_of_the_kept_tokens(model, ids):
    model.train()
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = -100  # nothing that is kept comes before it
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.grad_checkpoint
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        losses = []
        for row, kept in zip(ids, mask.bool()):
            logits = model(row[None, kept]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, row[kept][1:], reduction="none"))
        torch.cat(losses).mean().backward()
        assert len(found) > 40
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


def test_sequences_packed_by_their_positions_see_nothing_of_each_other(model, ids):
    lengths = (4, 2, 3)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(ids[:1], position_ids=positions).logits[0].split(lengths)
    for alone, found in zip(ids[0].split(lengths), packed):
        torch.testing.assert_close(found, model(alone[None]).logits[0], **CLOSE)


def test_logits_are_those_of_the_package_and_of_the_tokens_asked_for(path, model, ids):
    logits = model(ids).logits
    torch.testing.assert_close(logits, rp.load(path, device="cpu")(ids)[0])
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
    assert torch.equal(model(ids, return_dict=False)[0], logits)
    first = model(ids[:, :4], use_cache=True)
    assert first.state is first.cache is first.past_key_values is not None
    assert model.base_model(ids[:, :4]).cache is not None and model(ids, use_cache=False).cache is None
    for name in ("state", "cache", "past_key_values"):
        rest = model(ids[:, 4:], **{name: getattr(first, name)})
        torch.testing.assert_close(rest.logits, logits[:, 4:], **CLOSE)


def test_many_prompts_are_generated_from_as_each_alone(path, model):
    tokenizer = RWKVTokenizer("bytes")
    given = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert given.attention_mask[1].tolist() == [0] * 20 + [1] * 3

    def texts(**settings):
        drawn = model.generate(**given, max_new_tokens=6, **settings)[:, given.input_ids.shape[1] :]
        return tokenizer.batch_decode(drawn, skip_special_tokens=True)

    greedy = rp.load(path, device="cpu").generate(PROMPTS, 6, temperature=0, stop=())
    assert texts(do_sample=False) == greedy
    assert texts(num_beams=2, do_sample=False) == texts(num_beams=2, do_sample=False, use_cache=False)
    begun = model(given.input_ids[:1, :5], use_cache=True).state
    rest = model.generate(given.input_ids[:1, 5:], state=begun, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(rest[0, given.input_ids.shape[1] - 5 :], skip_special_tokens=True) == greedy[0]


def test_tokens_are_drawn_by_a_tape_until_the_model_is_another(model, ids, monkeypatch):
    ran = []
    monkeypatch.setattr(Tape, "run", lambda tape, run=Tape.run: ran.append(tape) or run(tape))

    def drawn():
        ran.clear()
        return model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)

    first = drawn()
    assert len(ran) == 4 and torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False), first)
    model.resize_token_embeddings(270, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[257:] = 0
    assert torch.equal(drawn(), first) and not ran


def test_a_saved_folder_is_read_by_the_auto_classes_and_by_convert(path, model, ids, tmp_path):
    folder = tmp_path / "hf"
    model.save_pretrained(folder)
    RWKVTokenizer("bytes").save_pretrained(folder)
    again, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(again) is type(model) and type(tokenizer) is RWKVTokenizer
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    assert again.config.dimensions == model.config.dimensions and again.config.pad_token_id == 0
    assert tokenizer(PROMPTS).input_ids == RWKVTokenizer("bytes")(PROMPTS).input_ids
    assert AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    convert(folder, tmp_path / "again.pth")
    again.save_pth(tmp_path / "pth.pth")
    for file in ("again.pth", "pth.pth"):
        found, due = open_base(tmp_path / file).tensors, open_base(path).tensors
        assert found.keys() == due.keys() and all(torch.equal(found[key], due[key]) for key in due)


def test_a_folder_in_rwkvs_own_layout_is_read(path, model, ids, tmp_path):
    convert(path, tmp_path / "hf", "--tokenizer", "bytes")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert re.fullmatch("Rwkv[67]ForCausalLM", settings["architectures"][0]) and "dimensions" not in settings
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(found(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template == RWKVTokenizer("bytes").chat_template
    assert tokenizer(PROMPTS).input_ids == RWKVTokenizer("bytes")(PROMPTS).input_ids
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_a_folder_of_flash_linear_attention_is_read(tmp_path, ids):
    state = random_state(family_named("x070"), n_layer=3, n_embd=128, head_size=64)
    state = {key: tensor for key, tensor in state.items() if key not in [f"blocks.0.att.v{i}" for i in range(3)]}
    folder = write(tmp_path / "hf", in_fla(state), {"eos_token_id": 7, "hidden_size": 128, "num_hidden_layers": 3})
    save_model(tmp_path / "base.pth", state)
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(found(ids).logits, RWKVForCausalLM.from_pth(tmp_path / "base.pth")(ids).logits)
    assert found.config.eos_token_id == 7 and found.config.num_hidden_layers == 3


class StandInConfig(PretrainedConfig):
    """A config class of transformers' own for RWKV-7, with the settings of its pull request #47787."""

    model_type = "rwkv7"
    hidden_size, num_heads, head_dim, norm_eps = 768, 12, 64, 1e-5


class StandIn(PreTrainedModel):
    """Its model: the parameters of #47787, under its names."""

    config_class, base_model_prefix = StandInConfig, "rwkv7"

    def __init__(self, config):
        super().__init__(config)
        family = family_named("x070")
        ranks = {"decay_rank": "decay", "iclr_rank": "a", "value_rank": "v", "gate_rank": "gate"}
        sizes = family.new_dimensions(
            config.num_hidden_layers, config.hidden_size, config.vocab_size, 0, config.intermediate_size
        )
        sizes = replace(sizes, **{name: getattr(config, f"{there}_low_rank_dim") for name, there in ranks.items()})
        self.rwkv7 = family.build(sizes)
        self.head = self.rwkv7.head
        del self.rwkv7.head
        self.post_init()


def test_transformers_own_rwkv7_is_not_shadowed(tmp_path, ids, monkeypatch):
    demo = Path(__file__).resolve().parents[2] / "demo" / "rwkv7-demo.pth"
    convert(demo, tmp_path / "hf", "--tokenizer", "bytes")
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "rwkv7", StandInConfig)
    mapping = AutoModelForCausalLM._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", {**mapping._extra_content, StandInConfig: StandIn})
    register_rwkv()
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(found) is StandIn and not report["missing_keys"] and not report["unexpected_keys"]
    assert AutoConfig.for_model("rwkv7").num_heads == 12
    ours = RWKVForCausalLM.from_pretrained(tmp_path / "hf")  # for training
    assert torch.equal(ours(ids).logits, RWKVForCausalLM.from_pth(demo)(ids).logits)


def test_a_config_of_transformers_own_names_gives_the_sizes():
    for heads in ({"head_dim": 32}, {"num_heads": 4}, {"head_size": 32}):
        config = RWKV7Config(vocab_size=257, hidden_size=128, num_hidden_layers=2, **heads)
        assert config.model_config().head_size == 32


def test_a_new_model_is_drawn_by_its_generations_rule(model):
    torch.manual_seed(3)
    settings = {name: getattr(model.config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    sizes = {"head_size": 32, "intermediate_size": model.model.config.dim_ffn}
    new = AutoModelForCausalLM.from_config(AutoConfig.for_model(model.config.model_type, **settings, **sizes))
    torch.manual_seed(3)
    network = model.config.family.build(new.config.model_config())
    model.config.family.init_weights(network)
    expected = network.state_dict()
    assert all(torch.equal(tensor, expected[key.removeprefix("model.")]) for key, tensor in new.state_dict().items())


def test_mistakes_are_told(path, model, ids, tmp_path):
    from peft import get_peft_model

    from rwkv_peft.hf import BoneConfig

    base = open_base(path)
    states = {key: torch.ones(shape) for key, shape in time_state_shapes(base.config).items()}
    save_model(tmp_path / "states.pth", base.tensors | states)
    for name in ("hf", "whole"):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "hf" / "config.json").unlink()
    adapted = get_peft_model(RWKVForCausalLM.from_pth(path), BoneConfig(r=8, target_modules=["key"])).base_model.model
    for mistake, words in (
        (lambda: model(ids, output_attentions=True), "output_attentions=True: .*; leave it out"),
        (lambda: RWKVForCausalLM.from_pth(tmp_path / "states.pth"), "tuned time states.*; take the model without them"),
        (lambda: RWKVForCausalLM.from_pretrained(tmp_path / "hf"), "has no config.json"),
        *(
            (lambda asked=asked: AutoModelForCausalLM.from_pretrained(tmp_path / "whole", **asked), "quant='nf4'")
            for asked in ({"quantization_config": {"load_in_8bit": True}}, {"load_in_4bit": True})
        ),
        (lambda: adapted.save_pth(tmp_path / "m.pth"), "call merge_and_unload\\(\\) first"),
        (lambda: RWKVTokenizer(tmp_path / "none.txt"), "no such file; give world, bytes"),
    ):
        with pytest.raises(UserError, match=words):
            mistake()
    assert not (tmp_path / "m.pth").exists()


def test_the_guides_example_runs(tmp_path, monkeypatch, capsys):
    root = Path(__file__).resolve().parents[2]
    guide = (root / "docs" / "guides" / "hugging-face.md").read_text(encoding="utf-8")
    block = next(text for text in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "from_pth(" in text)
    (tmp_path / "demo").mkdir()
    shutil.copy(root / "demo" / "rwkv7-demo.pth", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "hugging-face.md", "exec"), {})
    assert "A: red" in capsys.readouterr().out
    assert open_base("model.pth").config == open_base("demo/rwkv7-demo.pth").config
    assert len(AutoTokenizer.from_pretrained("folder")) == 257


def test_config_of_tells_what_a_generation_is(model):
    config = config_of(model.model.config, eos_token_id=5)
    assert config.model_config() == model.model.config and config.eos_token_id == 5
    assert config.family.version == model.model.config.version


def test_a_generation_without_a_form_is_refused(tmp_path):
    family = family_named("x070a")
    config = family.new_dimensions(1, 64, 2, head_size=32)
    save_model(tmp_path / "7a.pth", {key: torch.zeros(shape) for key, shape in family.shapes(config).items()})
    with pytest.raises(UserError, match="RWKV-7a has no form as a Hugging Face folder here"):
        RWKVForCausalLM.from_pth(tmp_path / "7a.pth")
