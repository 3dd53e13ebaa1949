"""The main loop of a kernel with products, read from the machine code of sm_90.

Its instructions, of one warp and iteration, bracket the kernel's speed without a GPU. A program's
warps, over the four schedulers of a processor, take one iteration's

    flops / 4096 (2048 for tf32)     clocks of the tensor cores
    8 MUFU warps / 4                 clocks of the special functions
    (FP32 + other) warps / 4         clocks of everything else

and the sum of the three is the time if none overlaps, the largest of them if all do. TFLOP/s are of
an H200 whose processors run nothing but this loop. Memory is not in it, nor shared memory, which
products of fewer than 64 columns wait for: it is a bound by instructions, no forecast.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .devices import TARGETS

# 132 processors at 4096 flops a clock make 949 TFLOP/s of it; the datasheet's 989 are of 1.83 GHz
GHZ = 1.755
SMS = TARGETS["sm_90"].device.sms

_PRODUCT = re.compile(r"[HIQ]GMMA\.64x(\d+)x(\d+)")
_FP32 = re.compile(r"F(ADD|MUL|FMA|MNMX|SEL|SET|SETP|CHK|SWZADD)\b")
_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", re.MULTILINE
)


@dataclass(frozen=True)
class Loop:
    """Instructions of one warp and iteration, and what the program's warps compute with them."""

    tensor: int
    mufu: int
    fp32: int
    other: int
    warps: int
    flops: int
    tensor_clocks: int

    @property
    def tflops(self) -> tuple[float, float]:
        mufu, rest = 8 * self.mufu * self.warps / 4, (self.fp32 + self.other) * self.warps / 4
        return bracket(self.flops, self.tensor_clocks, mufu, rest)

    def __str__(self) -> str:
        low, high = self.tflops
        counts = f"{self.tensor} tensor {self.mufu} MUFU {self.fp32} FP32 {self.other} other"
        return f"{counts}; {low:.0f}..{high:.0f} TFLOP/s"


def bracket(flops: float, *clocks: float) -> tuple[float, float]:
    """TFLOP/s of an H200 whose processors do `flops` in these clocks, without overlap and with."""
    rate = SMS * GHZ * flops / 1000
    return rate / sum(clocks), rate / max(clocks)


class _Instruction(NamedTuple):
    address: int
    guarded: bool
    name: str
    operands: str

    @property
    def is_product(self) -> bool:
        return bool(_PRODUCT.match(self.name))

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name[:3] == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        if self.guarded or "," in self.operands:
            return True
        return self.name.partition(".")[0] not in ("BRA", "BRX", "JMX", "EXIT", "RET")


def main_loop(sass: str, warps: int) -> Loop | None:
    """The innermost loop with the most products, the shortest of several; None without products.

    Of a loop that exists with and without masks, that is the one without.
    """
    loops = [ways for function in sass.split("Function :") for ways in _innermost(function)]
    if not loops:
        return None
    way = max(loops, key=lambda way: (sum(i.is_product for i in way), -len(way)))
    shapes = [(int(m[1]), int(m[2])) for m in (_PRODUCT.match(i.name) for i in way) if m]
    mufu = sum(i.name.startswith("MUFU") for i in way)
    fp32 = sum(bool(_FP32.match(i.name)) for i in way)
    groups = warps // 4
    return Loop(
        len(shapes), mufu, fp32, len(way) - len(shapes) - mufu - fp32, warps,
        flops=groups * sum(2 * 64 * n * k for n, k in shapes),
        # 64 x N x 16 in 16 bits at 4096 flops a clock; tf32 takes as long over a K of 8
        tensor_clocks=groups * sum(n // 2 for n, _ in shapes),
    )  # fmt: skip


def _innermost(function: str) -> Iterator[list[_Instruction]]:
    """Once round each loop that has products and holds no other such loop."""
    code = [
        _Instruction(int(address, 16), bool(guard), name, operands)
        for address, guard, name, operands in _LINE.findall(function)
    ]
    at = {instruction.address: i for i, instruction in enumerate(code)}
    to = [at.get(instruction.target, len(code)) for instruction in code]  # type: ignore[arg-type]
    ways = {}
    for end, start in enumerate(to):
        if start <= end:
            way = _once_round(code, to, start, end)
            if any(instruction.is_product for instruction in way):
                ways[start, end] = way
    for start, end in ways:
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in ways):
            yield ways[start, end]


def _once_round(
    code: list[_Instruction], to: list[int], start: int, end: int
) -> list[_Instruction]:
    """The shortest way down from `start` to `end` past the most products; empty if there is none.

    It leaves out what only some iterations run: the epilogue in a flattened loop, and where warps
    wait for a barrier. That code lies behind the loop and jumps back into it, which is no loop: no
    way leads down from where it returns to itself.
    """
    best = {end: (int(code[end].is_product), -1)}
    follow = {}
    for i in range(end - 1, start - 1, -1):
        nexts = [j for j in (i + 1 if code[i].falls_through else -1, to[i]) if j in best]
        if nexts:
            follow[i] = max(nexts, key=best.__getitem__)
            products, length = best[follow[i]]
            best[i] = products + code[i].is_product, length - 1
    if start not in best:
        return []
    way = [start]
    while way[-1] != end:
        way.append(follow[way[-1]])
    return [code[i] for i in way]
