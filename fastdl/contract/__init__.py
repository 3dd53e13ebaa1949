"""What every op must survive: its cases, and the checks that run on all of them."""

from . import activation, attention, glu, layernorm, linear, rmsnorm, rotary
from . import (
    activation,
    attention,
    batchnorm,
    groupnorm,
    instancenorm,
    layernorm,
    linear,
    rmsnorm,
    rotary,
)
from . import activation, attention, layernorm, linear, rmsnorm, rotary, softmax
from . import activation, attention, embedding, layernorm, linear, losses, rmsnorm, rotary
from .case import (
    DTYPES as DTYPES,
    BenchCase as BenchCase,
    Case as Case,
    Maker as Maker,
    Spec as Spec,
)
from .optim import STEPS as STEPS, StepSpec as StepSpec

SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        linear.SPEC,
        activation.SPEC,
        layernorm.SPEC,
        rmsnorm.SPEC,
        groupnorm.SPEC,
        batchnorm.SPEC,
        instancenorm.SPEC,
        attention.SPEC,
        rotary.SPEC,
        glu.SPEC,
        softmax.SPEC,
        embedding.SPEC,
        losses.SPEC,
    )
}
