"""torch's modules on the fused ops: same constructors, same state, another forward."""

from .activation import (
    CELU as CELU,
    ELU as ELU,
    GELU as GELU,
    SELU as SELU,
    Dropout as Dropout,
    Hardsigmoid as Hardsigmoid,
    Hardswish as Hardswish,
    Hardtanh as Hardtanh,
    LeakyReLU as LeakyReLU,
    LogSigmoid as LogSigmoid,
    Mish as Mish,
    ReLU as ReLU,
    ReLU6 as ReLU6,
    Sigmoid as Sigmoid,
    SiLU as SiLU,
    Softplus as Softplus,
    Softsign as Softsign,
    Tanh as Tanh,
    Tanhshrink as Tanhshrink,
)
from .attention import (
    MultiheadAttention as MultiheadAttention,
    TransformerDecoderLayer as TransformerDecoderLayer,
    TransformerEncoderLayer as TransformerEncoderLayer,
)
from .linear import MLP as MLP, Linear as Linear
from .norm import LayerNorm as LayerNorm, RMSNorm as RMSNorm
from .rnn import (
    GRU as GRU,
    LSTM as LSTM,
    RNN as RNN,
    GRUCell as GRUCell,
    LayerNormLSTM as LayerNormLSTM,
    LSTMCell as LSTMCell,
    RNNCell as RNNCell,
)
