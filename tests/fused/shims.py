"""Small models whose blocks are fused as on a GPU, on the CPU: a step on them, and the CUDA kernels of tests/cuda_shim
in place of a GPU's."""

import torch

from cuda_shim.running import built
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import METHODS, words_of
from rwkv_peft.config import AdapterConfig
from rwkv_peft.fused import Setting
from rwkv_peft.models.state import LayerState, State
from rwkv_peft.ops.bone import cuda as bone_cuda
from rwkv_peft.ops.bone import op as bone_op
from rwkv_peft.ops.mix import cpu as mix_cpu
from rwkv_peft.ops.mix import cuda as mix_cuda
from rwkv_peft.ops.wkv7 import cuda as wkv7_cuda

GPU = Setting(torch.device("meta"))  # which no kernel is asked about


def model_of(family, method, checkpoint=False, channels=64, rank=16, quant="none"):
    """A random model in bfloat16, frozen but for the adapters of a method, or whole."""
    model = family.build(family.new_dimensions(2, channels, 40), checkpoint).bfloat16()
    draw(model)  # of which a method may make its constants
    if method in METHODS:
        words = words_of(METHODS[method])
        config = AdapterConfig(**words, rank=rank, mini_rank=rank, entries=rank, targets=family.targets, quant=quant)
        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
        inject(model, config, family=family, gradients={name: torch.randn_like(one.weight) for name, one in layers})
        draw(model)
    else:
        model.requires_grad_(method == "whole")
    return model


@torch.no_grad()
def draw(model):
    """Fill all trainable tensors with random numbers, so that none is still at its start."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            random = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * random if ".ln" in name and name.endswith("weight") else 0.1 * random)


def states_of(model, sequences, seed=1):
    """A random State, whose tensors are leaves with gradients."""
    generator = torch.Generator().manual_seed(seed)
    zeros = State.zeros(model.config, sequences, dtype=model.emb.weight.dtype)
    drawn = [[0.3 * torch.randn(x.shape, generator=generator) for x in layer] for layer in zeros]
    leaves = [[y.to(x.dtype).requires_grad_() for x, y in zip(*pair)] for pair in zip(zeros, drawn)]
    return State(LayerState(*layer) for layer in leaves)


def step(model, tokens, cu_seqlens=None, state=None):
    """Logits, the states' tensors, and the gradient of every parameter and state that has one."""
    y, after = model(tokens, state, cu_seqlens)
    kept = [x for layer in after for x in layer]
    given = [] if state is None else [x for layer in state for x in layer]
    model.zero_grad()
    loss = y.square().sum() + sum(x.square().sum() for x in kept)
    if loss.requires_grad:
        loss.backward()
    return [y, *kept, *(x.grad for x in (*model.parameters(), *given) if x.grad is not None)]


def on_shims(patch):
    """The fused blocks' kernels run on the CPU -> the names of mix's and bone's launches."""
    mix, bone, recurrence = (built(module.FAMILY) for module in (mix_cuda, bone_cuda, wkv7_cuda))
    launched, call, run_bone = [], mix_cpu.call, bone_cuda.call

    def mix_call(name, like, tensors, **sizes):
        if name not in mix_cuda.TILED and not name.startswith(("tanh", "bonus")):
            return call(name, like, tensors, **sizes)  # of operations that a CPU has kernels for
        launched.append(name)
        mix_cuda.call(name, like, tensors, **sizes)

    def bone_call(name, *rest, **sizes):
        launched.append(name)
        run_bone(name, *rest, **sizes)

    patch.setattr(mix_cpu, "call", mix_call)
    patch.setattr(bone_cuda, "call", bone_call)
    patch.setattr(bone_op, "backend", lambda first, *_, **__: bone_cuda if first.dtype == torch.bfloat16 else None)
    for family, kernels in ((mix_cuda.FAMILY, mix), (bone_cuda.FAMILY, bone), (wkv7_cuda.FAMILY, recurrence)):
        patch.setattr(family, "kernels", lambda device, kernels=kernels: kernels)
    return launched
