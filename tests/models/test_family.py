"""The interface that every generation must implement, by parameter: a new one joins by its line in FAMILIES."""

import weakref

import pytest
import torch
from torch import nn

from rwkv_peft.checkpoints.base import base_of
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import FAMILIES, family_named, family_of, official_key

pytestmark = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture
def config(family):
    return family.new_dimensions(n_layer=2, n_embd=64, vocab_size=50, head_size=16)


@pytest.fixture
def model(family, config):
    torch.manual_seed(0)
    model = family.build(config)
    family.init_weights(model)
    return model


def test_a_new_models_tensors_are_a_complete_checkpoint(family, config, model):
    tensors = model.state_dict()
    shapes = family.shapes(config)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shapes
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    base = base_of(tensors)
    assert base.family is family and base.config == config and family_named(config.version) is family
    logits = family.load(tensors, config)(torch.arange(7)[None])[0]
    assert torch.equal(logits, model(torch.arange(7)[None])[0])


@pytest.mark.parametrize("grad_checkpoint", (False, True))
def test_states_that_nobody_wants_are_held_no_longer_than_their_block(model, grad_checkpoint):
    model.grad_checkpoint = grad_checkpoint
    tokens, bounds, states = torch.arange(9)[None], torch.tensor([0, 2, 9]), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: alive.append(sum(state() is not None for state in states)))
        block.register_forward_hook(lambda _, inputs, out: states.append(weakref.ref(out[-1].wkv)))
    alive = []
    expected, after = model(tokens, cu_seqlens=bounds)
    assert len(after) == 2 and alive == [0, 1]
    del after
    alive.clear(), states.clear()
    logits, after = model(tokens, cu_seqlens=bounds, keep=False)
    assert torch.equal(logits, expected) and len(after) == 0 and alive == [0, 0]


def test_a_checkpoint_is_known_by_its_sign_alone(family, model):
    tensors = model.state_dict()
    assert family_of(tensors) is family
    assert [other for other in FAMILIES if other.sign in tensors][-1] is family
    with pytest.raises(UserError, match="no RWKV version known here"):
        family_of({"emb.weight": tensors["emb.weight"]})


def test_each_missing_extra_or_misshapen_tensor_is_told(family, config, model):
    tensors = model.state_dict()
    for key in tensors:
        rest = {name: tensor for name, tensor in tensors.items() if name != key}
        with pytest.raises(UserError):
            family.check(rest)
    with pytest.raises(UserError, match="1 unexpected tensors"):
        family.check(tensors | {"blocks.0.att.other": torch.ones(1)})
    with pytest.raises(UserError, match=r"1 unexpected tensors \(x{200}…\)"):
        family.check(tensors | {"x" * 10_000: torch.ones(1)})
    with pytest.raises(UserError, match="weights must be"):
        family.check(tensors | {"ln_out.weight": torch.ones(64, dtype=torch.int32)})


def test_targets_are_the_linear_layers_of_a_block(family, model):
    linear = {name for name, module in model.blocks[1].named_modules() if isinstance(module, nn.Linear)}
    own = {name for name in linear if family.part_of(f"blocks.1.{name}.weight")}  # of an embedding of the block
    assert linear - own == set(family.targets)


def test_parts_name_parameters_that_no_adapter_takes(family, model):
    found = {name: family.part_of(name) for name, _ in model.named_parameters()}
    adapted = {f"blocks.{i}.{target}.weight" for i in (0, 1) for target in family.targets}
    assert set(found.values()) == {*family.parts, None}
    assert {name for name, part in found.items() if part is None} == adapted
    assert family.part_of("blocks.0.att.time_state") not in family.parts  # state tuning is a part of its own


def test_learning_rates_are_told_for_every_parameter(family, model):
    for name, _ in model.named_parameters():
        scale, may_decay = family.learning_rate(name)
        assert scale > 0 and isinstance(may_decay, bool)
    assert family.learning_rate("blocks.0.att.key.bone") == (1.0, True)


def test_other_formats_names_lead_back(family, config):
    for key in family.shapes(config):
        assert family.from_hf(family.to_hf(key)) == key == family.from_hf(key)
        assert official_key(family.to_hf(key)) == key
        if family.gguf_architecture:
            assert family.from_web(family.to_web(key)) == key


def test_gguf_takes_every_value_once(family, config, model):
    tensors = dict(model.state_dict())
    if not family.gguf_architecture:
        for form in (family.to_web, family.hf_settings, family.gguf_settings):
            with pytest.raises(UserError, match=f"{family.name} has no form as .* here; take a .pth"):
                form(config)
        return
    made = list(family.gguf_tensors(tensors, config))
    assert len({name for name, *_ in made}) == len(made)
    assert all(tuple(make().shape) == shape for _, shape, make, _ in made)
    assert sum(make().numel() for _, _, make, _ in made) == sum(tensor.numel() for tensor in tensors.values())
    assert all(name.startswith("add_") for name, _ in family.gguf_settings(config))


def test_a_state_keeps_no_more_than_its_own_numbers(family, model):
    """The shifts hold only the last token of a block's inputs: if blocks are checkpointed, nothing else of the inputs
    stays."""
    _, state = model(torch.arange(9)[None])
    for layer in state:
        for shift in (layer.att_shift, layer.ffn_shift):
            assert shift.untyped_storage().nbytes() == shift.numel() * shift.element_size()
