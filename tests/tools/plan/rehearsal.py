"""Training steps whose bytes a tracker counts, which the plan's formulas are held to. Weights are memory that is never
written to; for a GPU tensors have no data at all (the meta device), and operations take their plain forms."""

import weakref
from dataclasses import replace

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rwkv_peft.adapters.groups import is_matrix
from rwkv_peft.adapters.inject import count_parameters, inject
from rwkv_peft.adapters.layer import AdapterLinear
from rwkv_peft.adapters.methods import method_of
from rwkv_peft.cli.names import STATE
from rwkv_peft.inference.sampling import sample
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.objectives.cross_entropy import L2WRAP
from rwkv_peft.objectives.divergence import Divergence, of_logits
from rwkv_peft.ops.cross_entropy import cross_entropy_
from rwkv_peft.tools.plan.command import estimate_of, parse_flags
from rwkv_peft.training.estimate.memory import GPU, Counts
from rwkv_peft.training.zero import live_parameters

NEW = ("--n_layer", "4", "--n_embd", "64", "--vocab_size", "80", "--dim_ffn", "256", "--ctx_len", "128")
LOGITS = 64  # rows of logits that are made to find the bytes of one
DRAWN = 2  # the same of drawing, which computes with them
VOCABULARY = 64  # of the rehearsed model; only logit_bytes takes the true one


def estimate(*flags, accelerator=GPU):
    """The plan of a small new model."""
    return estimate_of(parse_flags([*NEW, *flags]), accelerator)


# Operations that are not computed. Products of matrices: their values do not matter, and so no weight is read. The
# places at which a mask is not zero: tensors without data cannot tell, so that it is all of them.
SHORTCUTS = {
    torch.ops.aten.mm.default: lambda a, b: a.new_empty(a.shape[0], b.shape[1]),
    torch.ops.aten.bmm.default: lambda a, b: a.new_empty(*a.shape[:2], b.shape[2]),
    torch.ops.aten.addmm_.default: lambda total, *factors: total,
    torch.ops.aten.baddbmm_.default: lambda total, *factors: total,
    torch.ops.aten.nonzero.default: lambda x: torch.arange(x.numel(), device=x.device)[:, None],
}


class Tracker(TorchDispatchMode):
    """Count the bytes of tensors that are made within and still alive (live), and the most that these were (peak)."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def ignore(self, tensors):
        """Leave tensors out of the count that exist already."""
        self.known.update(tensor.untyped_storage() for tensor in tensors)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        shortcut = SHORTCUTS.get(function)
        result = function(*args, **(kwargs or {})) if shortcut is None else shortcut(*args)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.live -= size


def step_bytes(family, config, adapter, dtype, device, grad_cp, rows, tokens):
    """Take one step -> bytes that are (kept for the backward pass, held by states until the loss is computed, needed by
    the backward pass at once)."""
    model = build(family, replace(config, vocab_size=VOCABULARY), adapter, grad_cp).to(dtype).to_empty(device=device)
    for buffer in model.buffers():
        if not buffer.is_floating_point():
            buffer.zero_()  # an index, which must name a place
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    batch = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    tracker = Tracker()
    tracker.ignore([*model.parameters(), *model.buffers(), batch])
    with tracker:
        loss, states = model(batch, head=lambda x, weight: (x @ weight.t()).sum())
        held = tracker.live
        del states
        kept = tracker.peak = tracker.live
        loss.backward()
    return kept, held - kept, tracker.peak - kept


def _drop(parameter):
    """Free a parameter's gradient, which is a part of its own."""
    parameter.grad = None


def build(family, config, adapter, grad_cp=False):
    """Build the model with its adapters, on the meta device."""
    with torch.device("meta"):
        model = family.build(config, grad_cp)
        if STATE in adapter.train_parts:
            model.tune_states(parts=adapter.state_parts)
        inject(model, replace(adapter, quant="none"), family=family, initial=_constants(model, adapter))
    return model.train()


def _constants(model, adapter):
    """{"<module>.<constant>": tensor} of empty tensors for the factors that a method would compute from the weights."""
    method, found = method_of(adapter), {}
    if method is not None and method.held is not None:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
                shapes = method.tensors.shapes(adapter, module.out_features, module.in_features)
                found |= {f"{name}.{constant}": torch.empty(shapes[constant]) for constant in method.constants}
    return found


def logit_bytes(vocabulary, dtype, device, taught):
    """Bytes that the loss needs at once for a token of a chunk: logits and their gradient, as the kernel holds them;
    `taught` with those of a teacher."""
    hidden = torch.empty(LOGITS, 1, dtype=dtype, device=device)
    weight = torch.empty(vocabulary, 1, dtype=dtype, device=device)
    targets = torch.zeros(LOGITS, dtype=torch.long, device=device)
    tracker = Tracker()
    tracker.ignore([hidden, weight, targets])
    with tracker:
        if taught:
            settings = Divergence("jsd", 0.5, 1.0, 0.5)
            of_logits(F.linear(hidden, weight), F.linear(hidden, weight), targets, 1.0, settings)
        else:
            cross_entropy_(F.linear(hidden, weight), targets, 1.0, L2WRAP)
    return tracker.peak / LOGITS


def drawing_bytes(vocabulary, top_p, device):
    """Bytes that drawing a token of one answer needs at once, which is float32 logits and what is made of them."""
    tracker = Tracker()
    with tracker:
        sample(torch.zeros(DRAWN, vocabulary, device=device), [0.5] * DRAWN, Sampling(top_p=top_p))
    return tracker.peak / DRAWN


def count(family, model, adapter):
    """The Counts of a model with its adapters, by building it."""
    built = build(family, model, adapter)
    adapted = [module for module in built.modules() if isinstance(module, AdapterLinear)]
    weights = sum(module.weight.numel() for module in adapted)
    constants = sum(buffer.numel() for module in adapted for buffer in module.buffers())
    own = sum(module.get_parameter(name).numel() for module in adapted for name in module.method.parameters)
    trains, total = count_parameters(built)
    training = ((name, each) for name, each in built.named_parameters() if each.requires_grad)
    matrices = sum(each.numel() for name, each in training if is_matrix(name, each))
    quantized = weights if adapter.quant != "none" else 0
    return Counts(total, trains, matrices, own, quantized, constants, live_parameters(built), len(adapted))
