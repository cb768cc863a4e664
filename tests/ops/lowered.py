"""Products by the row that converts halves, told to the parent as JSON, on a processor that is told to have no
instructions for them: torch and its libraries read the instruction sets that they may use when they are loaded.

    cd tests && ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m ops.lowered
"""

import functools
import itertools
import json
import sys
from tempfile import TemporaryDirectory

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from families import shake, shaken
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import METHODS, words_of
from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.config import AdapterConfig
from rwkv_peft.inference.loading import load_model
from rwkv_peft.models import FAMILIES
from rwkv_peft.objectives.cross_entropy import linear_cross_entropy, token_losses
from rwkv_peft.objectives.divergence import Divergence, linear_divergence
from rwkv_peft.ops import products
from rwkv_peft.training.optimizers import orthogonal

ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm, ATEN.addmm, ATEN.addmm_, ATEN.bmm, ATEN.baddbmm, ATEN.baddbmm_, ATEN.mv, ATEN.dot, ATEN.linear}
SHAPES = ((5, 7, 300), (300, 7, 5), (5, 300, 7), (40, 41, 42), (3, 4, 5))  # rows, inner, columns


class Watch(TorchDispatchMode):
    """Keep the names of torch's products of some dtypes."""

    def __init__(self, dtypes=products.HALVES):
        super().__init__()
        self.seen, self.dtypes = set(), dtypes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in PRODUCTS:
            tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.seen |= {str(function)} if any(x.dtype in self.dtypes for x in tensors) else set()
        return function(*args, **(kwargs or {}))


@functools.cache
def exact(family, name):
    return gradients(family, name, torch.float64)


def gradients(family, name, dtype):
    """The gradients of a step's loss in all that trains, with weights that bfloat16 and float16 hold."""
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(n_layer=2, n_embd=32, vocab_size=40, head_size=16))
    family.init_weights(model)
    shake(model)
    if name != "none":
        config = AdapterConfig(**words_of(METHODS[name]), rank=8, mini_rank=8)
        drawn = {layer: torch.randn(m.weight.shape) for layer, m in model.named_modules() if hasattr(m, "in_features")}
        inject(model, config, family=family, gradients=drawn)
        shake(model)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.bfloat16().half().to(dtype)
    tokens = torch.randint(40, (2, 31))
    counted = torch.arange(60)
    loss, _ = model(tokens[:, :-1], head=lambda x, weight: linear_cross_entropy(x, weight, tokens[:, 1:], counted, 60))
    (loss * 1024).backward()
    trained = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    return [gradient.double() for gradient in trained]


def distance(found, due):
    """The root mean square of tensors' distances to others, as parts of these."""
    apart = [float((a - b).norm() / b.norm()) ** 2 for a, b in zip(found, due) if b.norm()]
    return (sum(apart) / len(apart)) ** 0.5


def steps():
    """Yield (case, torch's products of halves in a step, its distance to float64, that of torch's own products)."""
    cases = [(family, "none") for family in FAMILIES] + [(FAMILIES[1], name) for name in METHODS]
    converts = products.converts
    for (family, name), dtype in itertools.product(cases, products.HALVES):
        with Watch() as watch:
            found = gradients(family, name, dtype)
        due = exact(family, name)
        products.converts = lambda x: False
        plain = gradients(family, name, dtype)
        products.converts = converts
        yield f"{family.name} {name} {dtype}", sorted(watch.seen), distance(found, due), distance(plain, due)


def others():
    """Yield (case, torch's products of halves) of a prompt as generate and eval read it, of other losses, of Muon."""
    family, hidden, head = FAMILIES[1], torch.randn(1, 30, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    targets, counted, settings = torch.randint(40, (1, 30)), torch.arange(30), Divergence("forward", 0.5, 1.0, 0.5)
    with TemporaryDirectory() as folder:
        save_model(f"{folder}/base.pth", shaken(family, n_embd=32, vocab_size=40, head_size=16).state_dict())
        model, _ = load_model(f"{folder}/base.pth", precision="bf16")
    pair = hidden.requires_grad_(), head.requires_grad_()
    cases = {
        "a prompt": lambda: model(torch.randint(40, (1, 100))),
        "each token's loss": lambda: token_losses(*pair, targets, counted).sum().backward(),
        "a teacher": lambda: linear_divergence(pair, (hidden[0], head), targets, counted, 30, settings)[0].backward(),
        "muon": lambda: orthogonal(torch.randn(8, 16)),
    }
    for case, function in cases.items():
        with torch.set_grad_enabled(case not in ("a prompt", "muon")), Watch() as watch:
            function()
        yield case, sorted(watch.seen)


def matrices():
    """Yield (case, the largest error as a part of one rounding of the result) of products cut into parts and whole."""
    for (rows, inner, columns), dtype, size in itertools.product(SHAPES, products.HALVES, (64, 1 << 22)):
        torch.manual_seed(0)
        a, b, total = (torch.randn(s).to(dtype) for s in ((rows, inner), (inner, columns), (rows, columns)))
        products.ELEMENTS, A, B, T = size, a.double(), b.double(), total.double()
        found = {
            "matmul": (products.matmul(a, b), A @ B),
            "of three axes": (products.matmul(a[None], b)[0], A @ B),
            "of batches": (products.matmul(torch.stack([a, a]), torch.stack([b, b]))[1], A @ B),
            "linear": (products.linear(a, b.t(), b[0]), A @ B + B[0]),
            "addmm_": (products.addmm_(total.clone(), a, b, beta=0.5, alpha=2.0), 0.5 * T + 2 * A @ B),
            "addmm_ of 0": (products.addmm_(total.clone().fill_(torch.nan), a, b, beta=0), A @ B),
            "einsum": (products.einsum("ij,jk->ik", a, b), A @ B),
        }
        for name, (result, due) in found.items():
            assert result.dtype == dtype
            rounding = torch.finfo(dtype).eps / 2 * due.abs() + 1e-5
            error = ((result.double() - due).abs() / rounding).max()
            yield f"{name} {rows} {inner} {columns} {dtype} {size}", float(error)


def kept():
    """The dtypes of the tensors that a layer keeps for its backward pass."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(str(x.dtype)) or x, lambda x: x):
        x, weight = (torch.ones(4, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        products.linear(x, weight)
        products.matmul(x, weight)
    return sorted(set(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    own = products.row().recorded()
    with products.computing(products.CONVERTING):
        found = {"kept": kept(), "matrices": [*matrices()], "steps": [*steps()], "others": [*others()]}
    json.dump({"row": own, **found}, sys.stdout)
