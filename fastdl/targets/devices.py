"""The GPUs that kernels are compiled for, whether one is here or not."""

from dataclasses import dataclass, replace

from ..ops._launch import Device, cdiv


@dataclass(frozen=True)
class Target:
    """A GPU: what launch rules ask of it, and what programs on one of its processors share.

    `registers` are those of one lane's share of the processor: programs take them by warp.
    """

    device: Device
    warp_size: int
    warps: int
    registers: int
    shared: int

    @property
    def name(self) -> str:
        return self.device.name

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """How many programs of so many warps fit on a processor at once."""
        by_registers = self.registers // (cdiv(max(registers, 1), 8) * 8) // warps
        return max(0, min(by_registers, self.shared // max(shared, 1), self.warps // warps))


def _nvidia(arch: int, sms: int, shared: int) -> Target:
    device = Device(f"sm_{arch}", "cuda", arch, sms, shared)
    # 1 KB of every resident program is the system's
    return Target(device, 32, warps=64, registers=2048, shared=shared + 1024)


TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, 108, 166912),
        _nvidia(90, 132, 232448),
        _nvidia(100, 148, 232448),
        Target(Device("gfx942", "hip", "gfx942", 304, 65536), 64, 32, 2048, 65536),
    )
}


def target_like(device: Device) -> Target:
    """A GPU of which no more is known than launch rules ask."""
    return replace(TARGETS["gfx942" if device.backend == "hip" else "sm_90"], device=device)


def target_of(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(f"targets: got {name!r}, allowed are {', '.join(TARGETS)}")
    return TARGETS[name]
