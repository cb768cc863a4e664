"""A kernel's machine code as `cuobjdump -sass` prints it, and the way that a warp takes through a turn of its loop."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/")
CONTROL = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
PREDICATED = re.compile(r"@(!?U?P[0-9T]+)\s+(.*)")
REGISTER = re.compile(r"\bR(\d+)\b")
LONG = 64  # instructions of a branch's side, with which it may be some warps' own work
LONGEST = 50_000  # instructions of a turn; a way with more has gone wrong
NO_RESULT = ("STG", "STS", "LDGSTS", "BRA", "BAR", "ISETP", "FSETP")


@dataclass(frozen=True, eq=False)
class Instruction:
    """stall: cycles until the warp's next instruction may issue; write, read: the scoreboard that is released when the
    result is there, when the operands are read (7: none); waits: the scoreboards that must be free before."""

    address: int
    opcode: str
    operands: str
    predicate: str
    stall: int
    write: int
    read: int
    waits: tuple[int, ...]

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def target(self) -> int:
        """Where a branch goes; -1 for what is none. (BRA.DIV leads to what serves warps whose threads went apart.)"""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode in ("BRA", "BRA.U") else None
        return int(found.group(1), 16) if found else -1

    @cached_property
    def results(self) -> frozenset[int]:
        """The registers that it writes."""
        found = REGISTER.search(self.operands.split(",")[0])
        if not found or self.name in NO_RESULT:
            return frozenset()
        return _run(int(found.group(1)), _result_width(self))

    @cached_property
    def needs(self) -> frozenset[int]:
        """The registers that must have their values before it issues: those it reads, and those it writes."""
        fields = self.operands.split(",")
        if self.name == "HMMA":  # m16n8k16: D, A, B, C
            return self.results.union(*(_wide(text, width) for text, width in zip(fields[1:4], (4, 2, 4))))
        read = frozenset(int(register) for register in REGISTER.findall(self.operands))
        stored = REGISTER.findall(self.operands)[-1:] if self.name in ("STG", "STS") else []
        return read.union(self.results, *(_run(int(first), words(self)) for first in stored))


def words(instruction: Instruction) -> int:
    """The 32-bit words that a thread loads or stores."""
    parts = instruction.opcode.split(".")
    return 4 if "128" in parts else 2 if "64" in parts else 1


def _result_width(instruction: Instruction) -> int:
    if instruction.name in ("HMMA", "LDSM"):
        return 4
    return 2 if "WIDE" in instruction.opcode or instruction.name == "CS2R" else words(instruction)


def _run(first: int, count: int) -> frozenset[int]:
    return frozenset(range(first, first + count))


def _wide(operand: str, width: int) -> frozenset[int]:
    found = REGISTER.search(operand)
    return _run(int(found.group(1)), width) if found else frozenset()


def read_listing(text: str, kernel: str) -> list[Instruction]:
    """The instructions of `kernel` in a listing; KeyError where it is not in it."""
    body = re.search(rf"Function : {re.escape(kernel)}\n(.*?)(?=\n\s*Function : |\Z)", text, re.DOTALL)
    if not body:
        raise KeyError(kernel)
    return list(_instructions(body.group(1).splitlines()))


def _instructions(lines: Sequence[str]) -> Iterator[Instruction]:
    """An instruction is two lines; the upper half of its 128 bits, on the second, holds the control bits."""
    for line, following in zip(lines, lines[1:]):
        found, control = LINE.match(line), CONTROL.match(following)
        if not found or not control:
            continue
        bits = int(control.group(1), 16) >> 41
        predicated = PREDICATED.match(found.group(2))
        predicate, rest = predicated.groups() if predicated else ("", found.group(2))
        opcode, _, operands = rest.partition(" ")
        waits = tuple(board for board in range(6) if bits >> 11 + board & 1)
        yield Instruction(
            int(found.group(1), 16), opcode, operands, predicate, bits & 15, bits >> 5 & 7, bits >> 8 & 7, waits
        )


@dataclass(frozen=True)
class Loop:
    """What a listing does not tell of a kernel's longest loop.

    turns: of the loops inside, in the order of the code
    near: the first so many of these copy what the L2 cache has
    keeps: states are stored every so many turns, by the branch with the most stores
    helpers: where both sides of a branch are long, warps from this one on take the second, those before it the first;
        0 where all warps do the same
    lone: of the branches of which only one side is long, in their order, the warp that alone takes it, or None: all do
    """

    turns: tuple[int, ...] = ()
    near: int = 0
    keeps: int = 1
    helpers: int = 0
    lone: tuple[int | None, ...] = ()


@dataclass
class Way:
    """The ways of warps through turns of a kernel's longest loop in its steady state: a branch that may skip work does
    not; of two sides the longer is taken; divisions' rare cases, which are calls, are not met."""

    code: list[Instruction]
    loop: Loop
    _known: dict[tuple[int, bool], list[Instruction]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.at = {instruction.address: place for place, instruction in enumerate(self.code)}
        end = max(place for place, instruction in enumerate(self.code) if instruction.name == "EXIT")
        back = [
            (self.at[instruction.target], place)
            for place, instruction in enumerate(self.code[:end])
            if instruction.target in self.at and self.at[instruction.target] < place
        ]
        self.first, self.last = max(back, key=lambda ends: ends[1] - ends[0])
        inside = [ends for ends in back if self.first < ends[0] and ends[1] < self.last]
        if len(inside) != len(self.loop.turns):
            raise ValueError(f"{len(inside)} loops inside the longest, where {len(self.loop.turns)} are told of")
        self.turns = {place: turns for (_, place), turns in zip(inside, self.loop.turns)}
        self.near = {instruction for first, last in inside[: self.loop.near] for instruction in self.code[first:last]}
        self.forward = self._forward()
        uneven = [place for place in self.forward if self._uneven(place)] if self.loop.lone else []
        if len(uneven) != len(self.loop.lone):
            raise ValueError(f"{len(uneven)} branches with one long side, where {len(self.loop.lone)} are told of")
        self.lone = dict(zip(uneven, self.loop.lone))
        self.keeping = max(self.forward, key=self._stores, default=-1) if self.loop.keeps > 1 else -1

    def turn(self, warp: int, number: int) -> list[Instruction]:
        """What `warp` executes in turn `number`."""
        key = warp, number % self.loop.keeps == 0
        if key not in self._known:
            self._known[key] = list(self._walk(*key))
        return self._known[key]

    def _walk(self, warp: int, keeps: bool) -> Iterator[Instruction]:
        place, left = self.first, dict(self.turns)
        for _ in range(LONGEST):
            yield self.code[place]
            if place == self.last:
                return
            target = self.at.get(self.code[place].target, -1)
            if target < 0:
                place += 1
            elif place in left:
                left[place] -= 1
                again = left[place] > 0
                if not again:
                    left[place] = self.turns[place]
                place = target if again else place + 1
            else:
                place = target if self._taken(place, target, warp, keeps) else place + 1
        raise ValueError(f"no end of the loop in {LONGEST} instructions")

    def _taken(self, place: int, target: int, warp: int, keeps: bool) -> bool:
        """Whether a forward branch is."""
        if not self.code[place].predicate:
            return True
        if place == self.keeping:
            return not keeps
        skipped, other = self._sides(place)
        if "CALL" in self._names(place, target) and self._innermost(place):
            return True
        if min(skipped, other) > LONG and self.loop.helpers:
            return warp >= self.loop.helpers
        longer = other > skipped
        return longer if self.lone.get(place) in (None, warp) else not longer

    def _forward(self) -> list[int]:
        """The loop's forward branches under a predicate."""
        return [
            place
            for place in range(self.first, self.last)
            if self.code[place].predicate and self.at.get(self.code[place].target, -1) > place
        ]

    def _sides(self, place: int) -> tuple[int, int]:
        """The instructions that a forward branch skips, and those of its other side, which the skipped ones end in
        front of: 0 where there is none."""
        target = self.at[self.code[place].target]
        before = self.code[target - 1]
        join = self.at.get(before.target, -1) if not before.predicate else -1
        return target - place - 1, max(join - target, 0)

    def _names(self, first: int, end: int) -> set[str]:
        return {instruction.name for instruction in self.code[first:end]}

    def _innermost(self, place: int) -> bool:
        """Whether none of the forward branches lies in what this one skips or in its other side."""
        end = place + 1 + sum(self._sides(place))
        return not any(place < other < end for other in self.forward)

    def _uneven(self, place: int) -> bool:
        """Whether one side is long, and nobody waits in it."""
        sides = self._sides(place)
        waits = "BAR" in self._names(place, place + 1 + sum(sides))
        return min(sides) <= LONG < max(sides) and self._innermost(place) and not waits

    def _stores(self, place: int) -> int:
        """The stores that a branch skips beside which it skips neither barriers nor products."""
        skipped = self.code[place + 1 : self.at[self.code[place].target]]
        alone = not any(instruction.name in ("BAR", "HMMA") for instruction in skipped)
        return sum(instruction.name == "STG" for instruction in skipped) if alone else 0
