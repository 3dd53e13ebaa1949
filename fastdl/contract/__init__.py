"""What every op must survive: its cases, and the checks that run on all of them."""

from . import (
    activation,
    attention,
    batchnorm,
    causal_conv1d,
    conv,
    cross_entropy,
    embedding,
    glu,
    groupnorm,
    instancenorm,
    layernorm,
    linear,
    linear_cross_entropy,
    losses,
    nll_loss,
    rmsnorm,
    rotary,
    softmax,
)
from .case import (
    DTYPES as DTYPES,
    BenchCase as BenchCase,
    Case as Case,
    Maker as Maker,
    Spec as Spec,
)
from .optim import STEPS as STEPS, StepSpec as StepSpec

SPECS: dict[str, Spec] = {
    module.SPEC.name: module.SPEC
    for module in (
        linear,
        activation,
        glu,
        layernorm,
        rmsnorm,
        groupnorm,
        batchnorm,
        instancenorm,
        attention,
        rotary,
        softmax,
        conv,
        causal_conv1d,
        embedding,
        cross_entropy,
        linear_cross_entropy,
        nll_loss,
        losses,
    )
}
