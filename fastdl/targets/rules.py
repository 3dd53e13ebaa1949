"""What a test fails on, and what is excused from it, with the reason."""

from collections.abc import Callable
from typing import NamedTuple

from .binary import Facts
from .devices import Target
from .record import Specialisation

# Instructions of tensor cores that each family of GPU has, best first.
_TENSOR = ("tcgen05", "wgmma", "mma", "mfma")


class Fault(NamedTuple):
    rule: str
    reason: str


class Excuse(NamedTuple):
    """Why faults of one rule are accepted in one kernel, or (None) in all."""

    kernel: str | None
    rule: str
    when: Callable[[Specialisation, Facts, Target], bool]
    reason: str


def _few(spec: Specialisation, facts: Facts, target: Target) -> bool:
    return facts.spills <= 8 and facts.registers < 255


def _always(spec: Specialisation, facts: Facts, target: Target) -> bool:
    return True


EXCUSES = [
    Excuse(None, "spill", _few, "ptxas keeps registers free for one more program"),
    Excuse("channelnorm_merge", "narrow", _always, "its tensors are small"),
    Excuse("channelnorm_merge_sums", "narrow", _always, "its tensors are small"),
]

# A tile that is stored this many times smaller than what is loaded is what a reduction leaves.
FEW = 8


def faults(spec: Specialisation, facts: Facts, target: Target) -> list[Fault]:
    """Everything that is wrong with a binary."""
    if facts.error:
        return [Fault("error", facts.error)]
    found = []
    if facts.spills:
        found.append(Fault("spill", f"{facts.spills} spill instructions"))
    if facts.shared > target.device.shared:
        found.append(
            Fault("shared", f"{facts.shared} B of shared memory, {target.device.shared} are there")
        )
    if not facts.resident and len(found) == 0:
        found.append(Fault("registers", f"{facts.registers} registers leave room for no program"))
    return found + _slow(spec, facts, target)


def _slow(spec: Specialisation, facts: Facts, target: Target) -> list[Fault]:
    """Products without the best tensor cores, and aligned tensors not moved 16 bytes at a time."""
    found, counts = [], facts.counts
    products = [dot for dot in facts.dots if dot[3] != "ieee"]
    if products and not any(counts.get(name) for name in _TENSOR):
        found.append(Fault("tensor", "no tensor cores"))
    elif target.name == "sm_90" and any(m >= 64 for m, *_ in products) and not counts["wgmma"]:
        found.append(Fault("tensor", "no wgmma"))
    # on AMD 64 lanes fill a cache line with less
    if target.warp_size == 32 and spec.aligned and _whole(spec):
        if not any(counts.get(name) for name in ("loads16", "async16", "tma")):
            found.append(Fault("narrow", "no 16-byte loads"))
        if not counts["stores16"] and facts.stored * FEW > facts.loaded:
            found.append(Fault("narrow", "no 16-byte stores"))
    return found


def _whole(spec: Specialisation) -> bool:
    """Whether a size allows 16-byte accesses, or the kernel looks for itself where they go."""
    sizes = [arg for arg in spec.args if arg == "1" or arg.split()[0] in ("i32", "i64")]
    return not sizes or bool({"i32 16", "i64 16"} & {*sizes})


def tensor_cores(facts: Facts) -> str:
    return " ".join(f"{name}:{facts.counts[name]}" for name in _TENSOR if facts.counts.get(name))


def verdict(spec: Specialisation, facts: Facts, target: Target) -> str:
    """ "ok", "exception: why" or "FAIL: what"."""
    excused, failed = [], []
    for fault in faults(spec, facts, target):
        reasons = [
            excuse.reason
            for excuse in EXCUSES
            if excuse.kernel in (None, spec.name)
            and excuse.rule == fault.rule
            and excuse.when(spec, facts, target)
        ]
        if reasons:
            excused.append(f"{fault.reason}: {reasons[0]}")
        else:
            failed.append(fault.reason)
    if failed:
        return f"FAIL: {', '.join(failed)}"
    return f"exception: {'; '.join(excused)}" if excused else "ok"
