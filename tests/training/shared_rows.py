"""One rank of test_shared_rows.py: computes its part of the cases' rows, and writes what it found.

python shared_rows.py RANK RANKS PORT FILE
"""

import sys
from functools import partial
from types import MappingProxyType
from unittest.mock import patch

import torch
import torch.distributed as dist

from rwkv_peft.adapters.inject import inject
from rwkv_peft.cli.names import STATE_PARTS
from rwkv_peft.config import AdapterConfig
from rwkv_peft.data.samples import collate
from rwkv_peft.models import FAMILIES
from rwkv_peft.models.layout import is_time_state
from rwkv_peft.objectives.distill import Distill
from rwkv_peft.objectives.next_token import NextToken
from rwkv_peft.training.step.context_parallel import Line, SharedRows

VOCABULARY, CPU = 30, torch.device("cpu")
LORA = AdapterConfig(method="lora", rank=4, train_parts=("ln", "time"))
# name -> (lengths of documents, whether they are packed, adapter or None for all parameters, --grad_cp)
CASES = MappingProxyType(
    {
        "row": ((256,), False, None, False),
        "weighed, padded": ((128, 100), False, AdapterConfig(rank=8), True),
        "packed": ((60, 2, 35, 31), True, LORA, False),  # two documents begin in one part, and one crosses two
        "at a border": ((64, 32, 32), True, None, True),
        "short": ((3,), False, None, False),
    }
)
LENGTH = 48  # of a segment


def case(family, name):
    """(model, batch) of a case; the model has tuned states, and no zeros in its tensors."""
    sizes, packed, adapter, grad_cp = CASES[name]
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(n_layer=3, n_embd=32, vocab_size=VOCABULARY, head_size=16), grad_cp)
    family.init_weights(model)
    model.tune_states(parts=STATE_PARTS)
    if adapter is not None:
        inject(model, adapter, family=family)
        for name, parameter in model.blocks[1:].named_parameters():
            parameter.requires_grad_(parameter.requires_grad or is_time_state(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    documents = [(torch.randint(VOCABULARY, (size + 1,)), torch.rand(size) < 0.7) for size in sizes]
    for _, mask in documents:
        mask[0] = True
    if name == "weighed, padded":
        documents = [(tokens, mask * (0.5 + torch.rand(len(mask)))) for tokens, mask in documents]
    return model, collate([documents] if packed else documents)


class Noted(NextToken):
    """NextToken that notes the logits."""

    def head(self, *of):
        loss = super().head(*of)

        def head(x, weight):
            noted.append((x @ weight.t()).detach())
            return loss(x, weight)

        return head


def found_by(step, model, batch):
    """(logits of each pass, sum of the losses, gradients) of a step, each of this rank's part."""
    noted.clear()
    batch = step.prepare_inputs(batch, CPU)
    step.loss(model, batch, 5.0).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    logits = [*noted]
    return logits, step.total(model, batch), gradients


def taught(step):
    """found_by of a step that learns from a teacher of the other generation."""
    model, batch = case(FAMILIES[0], "packed")
    return found_by(step(Distill(), teacher=case(FAMILIES[1], "packed")[0]), model, batch)


def near(step):
    """found_by of a step that keeps the model near its base."""
    return found_by(step(NextToken(kl_to_base=0.5)), *case(FAMILIES[0], "packed"))


def note_messages(line):
    """Note the messages of a line: (whether it goes by the ring, the other rank, whether this one sends, numbers)."""
    isend, recv = dist.isend, dist.recv

    def note(step, sends):
        def said(message, rank, group):
            messages.append((group is not None and group is line.ring, rank, sends, message.numel()))
            return step(message, rank, group)

        return said

    return patch.multiple(dist, isend=note(isend, True), recv=note(recv, False))


noted, messages = [], []


def main(rank, ranks, port, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    found = {}
    for parts in (2, 4):
        line = Line(rank, parts, 3)
        if rank >= parts:
            line.open_ring()  # as all ranks do
            continue  # what the group of the others finds
        for compute in (taught, near):
            found[compute.__name__, parts] = compute(partial(SharedRows, line=line))
        for family in FAMILIES[:2]:  # as tests/families.py has them
            for name in CASES:
                steps = {"SharedRows": SharedRows(Noted(), line), "in flight": SharedRows(Noted(), line, least=16)}
                steps |= {"SharedSegments": SharedRows(Noted(), line, chunk=LENGTH)} if parts == 4 else {}
                for kind, step in steps.items():
                    with note_messages(line):
                        found[family.version, parts, name, kind] = found_by(step, *case(family, name))
    torch.save(found | {"messages": messages}, f"{file}-{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
