"""A rough model of one multiprocessor of an H100 that runs blocks of one kernel: when each of their warps issues each
instruction, by the stall counts, scoreboards and registers of the machine code and by published latencies.

Four schedulers issue one instruction a cycle each, from the warp that issued last if it can go on, else from the oldest
that can. What is not in it: banks, caches, memory's bandwidth, other kernels. It gave 0.8 times the time of another
chunked kernel whose time on an H100 is published: take it for ratios.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from sass import Instruction, Way, words

SCHEDULERS = 4
SCOREBOARDS = 6
MULTIPLIED = 33  # cycles until a product of tensor cores may be read
BARRIER = 18  # from the last warp's arrival
BRANCH = 6  # the least that a branch stalls
ARRIVES = 700  # a copy from memory into shared memory
FROM_CACHE = 300  # a load, or a copy, that the L2 cache answers
READS = {"STG": 25, "LDG": 25}  # cycles until an instruction's operands are read; others' OPERANDS
OPERANDS = 10
QUEUE = 24  # cycles of shared memory's work that may wait before a scheduler has to


@dataclass(frozen=True)
class Unit:
    """pipe: the one of a scheduler that it occupies for `interval` cycles; latency: until its result is there; shared:
    whether it waits for shared memory's pipe, which all schedulers have in common, when that is far behind."""

    pipe: str
    interval: float
    latency: int = 4
    shared: bool = False


ALU = Unit("alu", 2)
UNIFORM = Unit("uniform", 2)
CONTROL = Unit("", 0)
UNITS = {
    "HMMA": Unit("tensor", 6.4),
    **dict.fromkeys(("FFMA", "FMUL", "FADD"), Unit("fma", 1)),
    "IMAD": Unit("imad", 2),
    "MUFU": Unit("mufu", 8, 22),
    "LDS": Unit("memory", 2, 29, True),
    "LDSM": Unit("memory", 2, 33, True),
    "STS": Unit("memory", 2, 12, True),
    "SHFL": Unit("memory", 2, 24, True),
    "LDGSTS": Unit("memory", 2, 20, True),
    "MOVM": Unit("memory", 2, 18),
    "STG": Unit("memory", 2, 30),
    "LDG": Unit("memory", 2, FROM_CACHE),
    **dict.fromkeys(("S2R", "S2UR"), Unit("special", 2, 25)),
    "LDC": Unit("special", 2, 30),
    "FCHK": Unit("special", 8, 20),
    **dict.fromkeys("BRA BSSY BSYNC EXIT CALL RET NOP BAR DEPBAR LDGDEPBAR WARPSYNC".split(), CONTROL),
}


@cache
def unit_of(instruction: Instruction) -> Unit:
    return UNITS.get(instruction.name, UNIFORM if instruction.name.startswith("U") else ALU)


@cache
def wavefronts(instruction: Instruction) -> int:
    """The cycles of shared memory's pipe that a warp's instruction takes."""
    if instruction.predicate == "!PT":
        return 0
    return (
        4 if instruction.name in ("LDSM", "LDGSTS") else words(instruction) if instruction.name in ("LDS", "STS") else 1
    )


@dataclass
class Warp:
    block: int
    number: int
    code: list[Instruction]  # of this turn
    able: float  # the first cycle at which its next instruction may issue, as far as it is for the warp alone
    place: int = 0
    turn: int = 0
    boards: list[float] = field(default_factory=lambda: [0.0] * SCOREBOARDS)
    products: dict[int, int] = field(default_factory=dict)  # register -> when a product is in it
    copied: float = 0
    ends: list[int] = field(default_factory=list)  # of its turns

    def wait(self, free: float) -> None:
        """Until cycle `free`, and for what the next instruction asks for."""
        instruction = self.code[self.place]
        boards = (self.boards[board] for board in instruction.waits)
        products = (self.products.get(register, 0) for register in instruction.needs) if self.products else ()
        self.able = max(free, self.copied if instruction.name == "DEPBAR" else 0, *boards, *products)


class Multiprocessor:
    """`blocks` blocks of `warps` warps each, each `phase` cycles behind the one before."""

    def __init__(self, way: Way, warps: int, blocks: int, phase: int) -> None:
        self.way, self.warps = way, warps
        self.all = [
            Warp(block, number, way.turn(number, 0), block * phase)
            for block in range(blocks)
            for number in range(warps)
        ]
        self.pipes: list[dict[str, float]] = [{} for _ in range(SCHEDULERS)]
        self.shared = 0.0  # when shared memory's pipe has done what it was given
        self.held: list[list[Warp]] = [[] for _ in range(blocks)]  # at a barrier

    def run(self, turns: int) -> float:
        """Cycles a turn, of the slowest warp, over the second half of `turns` turns."""
        queues = [[warp for warp in self.all if warp.number % SCHEDULERS == s] for s in range(SCHEDULERS)]
        cycle = 0
        while any(queues):
            issued = False
            for queue in queues:  # the warp that issued last, then the oldest first
                warp = next((warp for warp in queue if self.ready(warp) <= cycle), None)
                if not warp:
                    continue
                issued = True
                self.issue(warp, cycle)
                if warp is not queue[0]:
                    queue.sort(key=lambda other: (other is not warp, other.block, other.number))
                if warp.turn == turns:
                    queue.remove(warp)
            following = min((self.ready(warp) for queue in queues for warp in queue), default=0)
            cycle = cycle + 1 if issued else max(cycle + 1, math.ceil(following))
        half = turns // 2
        return max((warp.ends[turns - 1] - warp.ends[half - 1]) / (turns - half) for warp in self.all)

    def ready(self, warp: Warp) -> float:
        """The first cycle at which it can issue, where nobody else issues before."""
        unit = unit_of(warp.code[warp.place])
        at = max(warp.able, self.pipes[warp.number % SCHEDULERS].get(unit.pipe, 0))
        return max(at, self.shared - QUEUE) if unit.shared else at

    def issue(self, warp: Warp, cycle: int) -> None:
        instruction = warp.code[warp.place]
        unit, name = unit_of(instruction), instruction.name
        for register in instruction.results:
            warp.products.pop(register, None)
        if name == "HMMA":
            warp.products |= dict.fromkeys(instruction.results, cycle + MULTIPLIED)
        if unit.pipe:
            self.pipes[warp.number % SCHEDULERS][unit.pipe] = cycle + unit.interval
        done: float = cycle + unit.latency
        if unit.pipe == "memory":
            begins = max(self.shared, cycle)
            self.shared = begins + wavefronts(instruction)
            if name != "LDG":
                done = begins + unit.latency + (wavefronts(instruction) - 1 if name in ("LDS", "LDSM") else 0)
        if name == "LDGSTS":
            warp.copied = max(warp.copied, cycle + (FROM_CACHE if instruction in self.way.near else ARRIVES))
        if instruction.write < SCOREBOARDS and name != "LDGDEPBAR":
            warp.boards[instruction.write] = max(warp.boards[instruction.write], done)
        if instruction.read < SCOREBOARDS:
            read = cycle + READS.get(name, OPERANDS)
            warp.boards[instruction.read] = max(warp.boards[instruction.read], read)
        self.advance(warp, cycle)
        warp.wait(cycle + max(BRANCH if name == "BRA" else 1, instruction.stall))
        if name == "BAR":
            self.hold(warp, cycle)

    def advance(self, warp: Warp, cycle: int) -> None:
        """To its next instruction."""
        warp.place += 1
        if warp.place == len(warp.code):
            warp.ends.append(cycle)
            warp.turn, warp.place = warp.turn + 1, 0
            warp.code = self.way.turn(warp.number, warp.turn)

    def hold(self, warp: Warp, cycle: int) -> None:
        """At a barrier, until its block's last warp is there."""
        held = self.held[warp.block]
        held.append(warp)
        if len(held) < self.warps:
            warp.able = math.inf
            return
        for other in held:
            other.wait(cycle + BARRIER)
        held.clear()


PHASES: Sequence[int] = (0, 500, 1300, 2600)  # cycles that a block may be behind another


def cycles(way: Way, warps: int, blocks: int, turns: int) -> float:
    """Cycles a turn where `blocks` blocks share a multiprocessor, the mean over PHASES of the blocks to each other."""
    phases = PHASES if blocks > 1 else (0,)
    return sum(Multiprocessor(way, warps, blocks, phase).run(turns) for phase in phases) / len(phases)
