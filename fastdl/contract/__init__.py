"""What every op must survive: its cases, and the checks that run on all of them."""

from . import activation, attention, layernorm, linear, rmsnorm, rnn, rotary
from .case import (
    DTYPES as DTYPES,
    BenchCase as BenchCase,
    Case as Case,
    Maker as Maker,
    Spec as Spec,
)

SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        linear.SPEC,
        activation.SPEC,
        layernorm.SPEC,
        rmsnorm.SPEC,
        attention.SPEC,
        rotary.SPEC,
        rnn.LSTM_SPEC,
        rnn.NORM_SPEC,
        rnn.GRU_SPEC,
        rnn.RNN_SPEC,
    )
}
