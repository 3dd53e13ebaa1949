"""The children of a module, by what they are."""

from dataclasses import dataclass, field

from torch import nn

from ... import nn as fused
from .form import Act
from .leaves import Transposed

IDENTITIES = (nn.Identity, nn.Dropout, fused.Dropout)

# Classes of torch's and ours that stand for one another.
KINDS: dict[str, tuple[type, ...]] = {
    "linears": (nn.Linear, fused.Linear),
    "drops": IDENTITIES,
    "layer_norms": (nn.LayerNorm, fused.LayerNorm),
    "group_norms": (nn.GroupNorm, fused.GroupNorm),
    "batch_norms": (nn.BatchNorm2d, fused.BatchNorm2d),
    "convs": (nn.Conv2d, fused.Conv2d),
}


@dataclass
class Parts:
    """Names of attributes. `transposed` is the class of linear layers that are not torch's."""

    acts: list[Act] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)
    transposed: tuple[type, Transposed] | None = None
    drops: list[str] = field(default_factory=list)
    layer_norms: list[str] = field(default_factory=list)
    group_norms: list[str] = field(default_factory=list)
    batch_norms: list[str] = field(default_factory=list)
    convs: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def only(self, *kinds: str) -> bool:
        """Whether there is nothing but these, and not two activations to choose between."""
        rest = [*KINDS, "others"]
        return len({act.attribute for act in self.acts}) == 1 and not any(
            getattr(self, kind) for kind in rest if kind not in kinds
        )
