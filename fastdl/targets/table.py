"""The result: one line a kernel, target and configuration."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .binary import Facts
from .devices import target_of
from .record import Specialisation
from .rules import tensor_cores, verdict


@dataclass(frozen=True)
class Row:
    spec: Specialisation
    target: str
    facts: Facts

    @property
    def verdict(self) -> str:
        return verdict(self.spec, self.facts, target_of(self.target))

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("FAIL")

    def cells(self) -> tuple[str, ...]:
        facts, counts = self.facts, self.facts.counts
        wide = counts.get("loads16", 0) + counts.get("async16", 0) + counts.get("tma", 0)
        return (
            self.target,
            self.spec.name,
            self.spec.dtype + ("" if self.spec.aligned else " unaligned"),
            self.spec.config,
            *map(str, (facts.registers, facts.spills, facts.shared, facts.resident)),
            f"{wide}/{counts.get('loads', 0) + counts.get('tma', 0)}",
            f"{counts.get('stores16', 0)}/{counts.get('stores', 0)}",
            tensor_cores(facts) or "-",
            str(facts.loop or "-"),
            self.verdict,
        )


HEADER = (
    "target", "kernel", "type", "configuration", "regs", "spill", "shared", "CTA/SM",
    "16 B loads", "16 B stores", "tensor cores", "main loop", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """The machine code of every kernel that was compiled, and what is wrong with it."""

    rows: Sequence[Row]

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.failed]

    @property
    def ok(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        table = [HEADER, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        return "\n".join([*lines, f"{len(self.rows)} binaries, {len(self.failures)} failures"])

    def to_json(self) -> str:
        return json.dumps([_entry(row) for row in self.rows], indent=1)


def _entry(row: Row) -> dict[str, Any]:
    spec, facts = dataclasses.asdict(row.spec), dataclasses.asdict(row.facts)
    if row.facts.loop is not None:
        facts["loop"]["tflops"] = row.facts.loop.tflops
    return {
        "target": row.target,
        **spec,
        "constants": dict(row.spec.constants),
        **facts,
        "verdict": row.verdict,
    }
