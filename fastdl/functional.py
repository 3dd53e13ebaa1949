"""The fused ops, under the names and signatures of torch.nn.functional."""

# Pooling and interpolation are torch's, until a measurement asks for kernels.
from torch.nn.functional import (
    adaptive_avg_pool2d as adaptive_avg_pool2d,
    avg_pool2d as avg_pool2d,
    interpolate as interpolate,
    max_pool2d as max_pool2d,
)

from .ops import (  # noqa: F401 - these fill the list of what people write
    attention_spellings as _attention_spellings,
    conv_spellings as _conv_spellings,
    cross_entropy_spellings as _cross_entropy_spellings,
    glu_spellings as _glu_spellings,
    rnn_spellings as _rnn_spellings,
    softmax_spellings as _softmax_spellings,
    transformer_spellings as _transformer_spellings,
)
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
from .ops.batchnorm import batch_norm as batch_norm
from .ops.causal_conv1d import causal_conv1d as causal_conv1d
from .ops.conv import (
    conv1d as conv1d,
    conv2d as conv2d,
    conv_transpose2d as conv_transpose2d,
)
from .ops.cross_entropy import cross_entropy as cross_entropy
from .ops.embedding import embedding as embedding
from .ops.glu import glu as glu
from .ops.groupnorm import group_norm as group_norm
from .ops.instancenorm import instance_norm as instance_norm
from .ops.layernorm import layer_norm as layer_norm
from .ops.linear import linear as linear
from .ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .ops.linears import linears as linears
from .ops.loss_functions import (
    binary_cross_entropy_with_logits as binary_cross_entropy_with_logits,
    huber_loss as huber_loss,
    kl_div as kl_div,
    l1_loss as l1_loss,
    mse_loss as mse_loss,
    smooth_l1_loss as smooth_l1_loss,
)
from .ops.mlp import gated_mlp as gated_mlp, mlp as mlp
from .ops.multi_head_attention import (
    multi_head_attention_forward as multi_head_attention_forward,
)
from .ops.nll_loss import nll_loss as nll_loss
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
from .ops.softmax import log_softmax as log_softmax, softmax as softmax, softmin as softmin
