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
    linears,
    losses,
    nll_loss,
    rmsnorm,
    rnn,
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
    spec.name: spec
    for spec in (
        linear.SPEC,
        linears.SPEC,
        activation.SPEC,
        glu.SPEC,
        layernorm.SPEC,
        rmsnorm.SPEC,
        groupnorm.SPEC,
        batchnorm.SPEC,
        instancenorm.SPEC,
        attention.SPEC,
        rotary.SPEC,
        softmax.SPEC,
        conv.SPEC,
        causal_conv1d.SPEC,
        rnn.LSTM_SPEC,
        rnn.NORM_SPEC,
        rnn.GRU_SPEC,
        rnn.RNN_SPEC,
        embedding.SPEC,
        cross_entropy.SPEC,
        linear_cross_entropy.SPEC,
        nll_loss.SPEC,
        losses.SPEC,
    )
}
