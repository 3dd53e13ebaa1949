"""The fused ops, under the names and signatures of torch.nn.functional."""

from .ops.activation import activation as activation, dropout as dropout
from .ops.activation_functions import (
    celu as celu,
    elu as elu,
    gelu as gelu,
    gelu_tanh as gelu_tanh,
    hardsigmoid as hardsigmoid,
    hardswish as hardswish,
    hardtanh as hardtanh,
    leaky_relu as leaky_relu,
    logsigmoid as logsigmoid,
    mish as mish,
    quick_gelu as quick_gelu,
    relu as relu,
    relu2 as relu2,
    relu6 as relu6,
    selu as selu,
    sigmoid as sigmoid,
    silu as silu,
    softplus as softplus,
    softsign as softsign,
    tanh as tanh,
    tanhshrink as tanhshrink,
)
from .ops.attention import (
    scaled_dot_product_attention as scaled_dot_product_attention,
    varlen_attn as varlen_attn,
)
from .ops.attention_spellings import attention as _written_out  # noqa: F401 - fills SPELLINGS
from .ops.layernorm import layer_norm as layer_norm
from .ops.linear import linear as linear
from .ops.mlp import mlp as mlp
from .ops.multi_head_attention import (
    multi_head_attention_forward as multi_head_attention_forward,
)
from .ops.rmsnorm import rms_norm as rms_norm
from .ops.rnn_network import (
    gru as gru,
    gru_cell as gru_cell,
    layer_norm_lstm as layer_norm_lstm,
    lstm as lstm,
    lstm_cell as lstm_cell,
    rnn as rnn,
    rnn_relu_cell as rnn_relu_cell,
    rnn_tanh_cell as rnn_tanh_cell,
)
from .ops.rotary import apply_rotary_emb as apply_rotary_emb
