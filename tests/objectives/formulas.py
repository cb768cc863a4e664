"""The papers' formulas of the objectives' losses."""

import torch

from rwkv_peft.objectives.distill import Distill
from rwkv_peft.objectives.dpo import DPO
from rwkv_peft.objectives.ipo import IPO
from rwkv_peft.objectives.kto import KTO
from rwkv_peft.objectives.next_token import NextToken
from rwkv_peft.objectives.orpo import ORPO
from rwkv_peft.objectives.simpo import SimPO

KL = 0.3  # of the step before


def next_token(one, now, base, labels):
    tokens = torch.cat([answer for row in now for answer in row])
    return [(-token,) for token in tokens]


def dpo(one, now, base, labels):
    for (chosen, rejected), (chosen_before, rejected_before) in zip(now, base):
        gain = chosen.sum() - chosen_before.sum()
        margin = one.beta * (gain - (rejected.sum() - rejected_before.sum()))
        loss = -torch.log(1 / (1 + torch.exp(-margin))) - one.nll * chosen.mean()
        yield loss, margin > 0, margin, one.beta * gain


def ipo(one, now, base, labels):
    for (chosen, rejected), (chosen_before, rejected_before) in zip(now, base):
        gain = (chosen - chosen_before).mean()
        margin = gain - (rejected - rejected_before).mean()
        yield (margin - 1 / (2 * one.beta)) ** 2, margin > 0, margin, gain


def simpo(one, now, base, labels):
    for chosen, rejected in now:
        margin = one.beta / len(chosen) * chosen.sum() - one.beta / len(rejected) * rejected.sum()
        yield -torch.log(1 / (1 + torch.exp(-(margin - one.gamma)))), margin > 0, margin, -chosen.mean()


def orpo(one, now, base, labels):
    for row in now:
        chosen, rejected = (answer.mean().exp() for answer in row)
        ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
        loss = -torch.log(1 / (1 + torch.exp(-torch.log(ratio))))
        yield -row[0].mean() + one.weight * loss, ratio > 1, torch.log(ratio), -row[0].mean()


def kto(one, now, base, labels):
    gains = [[a.sum() - b.sum() for a, b in zip(*rows)] for rows in zip(now, base)]
    for (gain, mismatched), label in zip(gains, labels):
        margin = one.beta * (gain - KL) if label else one.beta * (KL - gain)
        weight = one.desirable if label else one.undesirable
        yield weight * (1 - torch.sigmoid(margin)), margin > 0, margin, mismatched


def distill(one, now, base, labels):
    ours, theirs = (torch.cat([answer for row in rows for answer in row]) for rows in (now, base))
    p, q = ((every[:, 1:] / one.temperature).softmax(1) for every in (ours, theirs))
    m = one.beta * q + (1 - one.beta) * p
    apart = one.beta * (q * (q / m).log()).sum(1) + (1 - one.beta) * (p * (p / m).log()).sum(1)
    apart = one.temperature**2 * apart
    return [(each, each, -token) for each, token in zip(apart, ours[:, 0])]


FORMULAS = {
    "next_token": (NextToken(), next_token),
    "dpo": (DPO(0.7, 0.3), dpo),
    "ipo": (IPO(0.7), ipo),
    "simpo": (SimPO(1.7, 0.4), simpo),
    "orpo": (ORPO(0.6), orpo),
    "kto": (KTO(0.7, 1.3, 0.8), kto),
    "distill": (Distill("teacher.pth", kind="jsd", beta=0.3, temperature=1.7), distill),
}
