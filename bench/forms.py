"""What users write without us, and what else torch has for it: the contenders of the timings."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastdl.functional as FF
from bench.attention import attention_rivals, torch_attention, torch_varlen, varlen_rivals

Form = Callable[..., Any]


def activated(y: Tensor, activation: Any, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    name, *parameters = activation if isinstance(activation, tuple) else (activation,)
    if name == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif name is not None:
        y = getattr(F, name)(y, *parameters)
    return F.dropout(y, dropout_p, training) if dropout_p else y


def torch_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    activation: Any = None, residual: Tensor | None = None, dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:  # fmt: skip
    y = activated(F.linear(input, weight, bias), activation, dropout_p, training)
    return y if residual is None else y + residual


def torch_linears(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, ...]:
    biases = [None] * len(weights) if biases is None else biases
    return tuple(F.linear(input, w, b) for w, b in zip(weights, biases, strict=True))


def torch_layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, residual: Tensor | None = None, prenorm: bool = False,
    scale: Tensor | None = None, shift: Tensor | None = None,
) -> Any:  # fmt: skip
    h = input if residual is None else input + residual
    y = F.layer_norm(h, normalized_shape, weight, bias, eps)
    y = y if scale is None else y * (1 + scale)
    y = y if shift is None else y + shift
    return (y, h) if prenorm else y


def torch_rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None,
    *, residual: Tensor | None = None, prenorm: bool = False, weight_offset: float = 0.0,
    cast: str = "torch",
) -> Any:  # fmt: skip
    h = input if residual is None else input + residual
    if cast == "torch" and not weight_offset:
        y = F.rms_norm(h, normalized_shape, weight, eps)
    else:
        y = F.rms_norm(h.float(), normalized_shape, None, eps)
        if weight is not None and cast == "llama":
            y = y.to(h.dtype) * (weight + weight_offset)
        elif weight is not None:
            y = y * (weight.float() + weight_offset)
        y = y.to(h.dtype)
    return (y, h) if prenorm else y


def torch_group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, activation: Any = None, residual: Tensor | None = None,
    scale: Tensor | None = None, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    y = F.group_norm(input, num_groups, weight, bias, eps)
    y = y if scale is None else y * (1 + scale)
    y = y if shift is None else y + shift
    return activated(y if residual is None else y + residual, activation)


def torch_batch_norm(
    *args: Any, activation: Any = None, residual: Tensor | None = None, **options: Any
) -> Tensor:
    y = F.batch_norm(*args, **options)
    return activated(y if residual is None else y + residual, activation)


def torch_instance_norm(
    *args: Any, activation: Any = None, residual: Tensor | None = None, **options: Any
) -> Tensor:
    y = F.instance_norm(*args, **options)
    return activated(y if residual is None else y + residual, activation)


def torch_activation(
    input: Tensor, name: Any, *, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    return activated(input, name, dropout_p, training)


def torch_glu(
    input: Tensor, dim: int = -1, *, activation: Any = "sigmoid", gate: Tensor | None = None,
    gate_first: bool = False,
) -> Tensor:  # fmt: skip
    if gate is None and activation == "sigmoid" and not gate_first:
        return F.glu(input, dim)
    if gate is None:
        halves = input.chunk(2, dim)
        input, gate = halves[::-1] if gate_first else halves
    return input * activated(gate, activation)


def torch_gated_mlp(
    input: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor,
    b_gate: Tensor | None = None, b_up: Tensor | None = None, b_down: Tensor | None = None, *,
    activation: Any = "silu", recompute: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    def run(x: Tensor) -> Tensor:
        gate = F.linear(x, w_gate, b_gate)
        if w_up is None:
            hidden = torch_glu(gate, activation=activation, gate_first=True)
        else:
            hidden = activated(gate, activation) * F.linear(x, w_up, b_up)
        y = F.linear(hidden, w_down, b_down)
        return y if residual is None else y + residual

    return checkpoint(run, input, use_reentrant=False) if recompute else run(input)


def torch_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False,
    positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
        cos, sin = (t.unsqueeze(1) if t.dim() == x.dim() - 1 else t for t in (cos, sin))
    if interleaved:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        rotated = torch.cat((-x2, x1), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


def torch_softmax(
    input: Tensor, dim: int | None = None, dtype: Any = None, *, scale: float = 1.0,
    mask: Tensor | None = None, fill: float = float("-inf"), softmax: Form = F.softmax,
) -> Tensor:  # fmt: skip
    s = input if scale == 1 else input * scale
    if mask is not None:
        s = s.masked_fill(~mask, fill) if mask.dtype == torch.bool else s + mask
    return softmax(s, dim, dtype=dtype)


def torch_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, z_loss: float = 0.0,
    softcap: float = 0.0, **options: Any,
) -> Tensor:  # fmt: skip
    z = softcap * torch.tanh(input / softcap) if softcap else input
    loss = F.cross_entropy(z, target, weight, **options)
    return loss + z_loss * torch.logsumexp(z, 1).square().mean() if z_loss else loss


def torch_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, chunk_size: int | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    return torch_cross_entropy(
        F.linear(input, linear_weight, linear_bias), target, weight, **options
    )


def torch_conv(convolve: Form) -> Form:
    def form(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any,
        activation: Any = None, residual: Tensor | None = None, norm: Any = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        y = convolve(input, weight, bias, *rest, **options)
        y = y if norm is None else F.batch_norm(y, *norm)
        return activated(y if residual is None else y + residual, activation)

    return form


def torch_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    activation: Any = None, initial_states: Tensor | None = None,
) -> Tensor:  # fmt: skip
    length, (channels, width) = x.shape[-1], weight.shape
    if initial_states is not None:
        x = torch.cat((initial_states, x), -1)
    padding = 0 if initial_states is not None else width - 1
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=padding, groups=channels)
    return activated(y[..., :length], activation)


def torch_recurrent(
    input: Tensor, hx: Any, weights: list[Tensor], *, states: int, nonlinearity: str = "",
    num_layers: int = 1, bidirectional: bool = False, batch_first: bool = False,
    batch_sizes: Tensor | None = None,
) -> Any:  # fmt: skip
    """What the forward of torch's modules calls."""
    name = {1: "gru", 2: "lstm"}[states] if not nonlinearity else f"rnn_{nonlinearity}"
    units = weights[1].shape[1]
    if hx is None:
        batch = input.shape[0 if batch_first else 1] if batch_sizes is None else batch_sizes[0]
        zeros = input.new_zeros(num_layers * (1 + bidirectional), batch, units)
        hx = (zeros, zeros) if states == 2 else zeros
    biases = len(weights) == 4 * num_layers * (1 + bidirectional)
    # cuDNN keeps what backward needs if it is told that this is training
    options = (weights, biases, num_layers, 0.0, input.requires_grad, bidirectional)
    if batch_sizes is not None:
        return getattr(torch._VF, name)(input, batch_sizes, hx, *options)
    return getattr(torch._VF, name)(input, hx, *options, batch_first)


def torch_layer_norm_lstm(
    input: Tensor, hx: Any, weights: list[Tensor], *, eps: float = 1e-5, num_layers: int = 1,
    bidirectional: bool = False, batch_first: bool = False,
) -> Any:  # fmt: skip
    """A loop over the steps of one layer, as there is no call for it."""
    assert not (bidirectional or batch_first) and num_layers == 1 and hx is None
    w_ih, w_hh, *factors = weights
    (g_x, b_x, g_h, b_h, g_c, b_c), wide = factors, w_ih.shape[:1]
    h = c = input.new_zeros(input.shape[1], w_hh.shape[1])
    outputs = []
    for x in F.layer_norm(F.linear(input, w_ih), wide, g_x, b_x, eps):
        gates = x + F.layer_norm(F.linear(h, w_hh), wide, g_h, b_h, eps)
        i, f, g, o = gates.chunk(4, -1)
        c = F.layer_norm(f.sigmoid() * c + i.sigmoid() * g.tanh(), c.shape[-1:], g_c, b_c, eps)
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), (h[None], c[None])


# What a user writes without us.
TORCH: dict[Any, Form] = {
    FF.linear: torch_linear,
    FF.linears: torch_linears,
    FF.layer_norm: torch_layer_norm,
    FF.rms_norm: torch_rms_norm,
    FF.group_norm: torch_group_norm,
    FF.batch_norm: torch_batch_norm,
    FF.instance_norm: torch_instance_norm,
    FF.softmax: torch_softmax,
    FF.log_softmax: partial(torch_softmax, softmax=F.log_softmax),
    FF.activation: torch_activation,
    FF.dropout: F.dropout,
    FF.glu: torch_glu,
    FF.gated_mlp: torch_gated_mlp,
    FF.apply_rotary_emb: torch_rotary,
    FF.embedding: F.embedding,
    FF.mse_loss: F.mse_loss,
    FF.l1_loss: F.l1_loss,
    FF.smooth_l1_loss: F.smooth_l1_loss,
    FF.huber_loss: F.huber_loss,
    FF.kl_div: F.kl_div,
    FF.binary_cross_entropy_with_logits: F.binary_cross_entropy_with_logits,
    FF.cross_entropy: torch_cross_entropy,
    FF.nll_loss: F.nll_loss,
    FF.linear_cross_entropy: torch_linear_cross_entropy,
    FF.conv1d: torch_conv(F.conv1d),
    FF.conv2d: torch_conv(F.conv2d),
    FF.conv_transpose2d: torch_conv(F.conv_transpose2d),
    FF.causal_conv1d: torch_causal_conv1d,
    FF.scaled_dot_product_attention: torch_attention,
    FF.varlen_attn: torch_varlen,
    FF.lstm: partial(torch_recurrent, states=2),
    FF.layer_norm_lstm: torch_layer_norm_lstm,
    FF.gru: partial(torch_recurrent, states=1),
    FF.rnn: partial(torch_recurrent, states=1),
}

# torch.compile would write out every step of these, which takes it minutes.
STEPPED = (FF.lstm, FF.gru, FF.rnn, FF.layer_norm_lstm)


def linear_rivals(call: "partial[Any]", compiled: bool) -> dict[str, Form]:
    """A single call of torch that does more of it than what users write: for inference."""
    options = call.keywords
    act = options.get("activation")
    extras = options.keys() - {"activation"}
    if extras or len(call.args) < 3 or call.args[2] is None or call.args[0].requires_grad:
        return {}
    if act not in ("relu", "gelu_tanh"):
        return {}
    gelu = act == "gelu_tanh"
    return {
        "addmm": lambda x, w, b, activation: torch._addmm_activation(b, x, w.t(), use_gelu=gelu)
    }


def chunked_rivals(call: "partial[Any]", compiled: bool) -> dict[str, Form]:
    """torch's own cross entropy in chunks."""
    chunked = getattr(F, "linear_cross_entropy", None)
    if chunked is None or call.keywords.keys() - {"linear_bias", "weight", "reduction"}:
        return {}
    options = torch.nn.LinearCrossEntropyOptions()
    return {"chunked": partial(chunked, options=options)}


def conv_rivals(call: "partial[Any]", compiled: bool) -> dict[str, Form]:
    """cuDNN's single call, which torch has for relu: for inference."""
    options = call.keywords
    simple = len(call.args) == 3 and options.get("activation") == "relu" and "norm" not in options
    if not simple or call.args[2] is None or call.args[0].requires_grad:
        return {}

    def cudnn(input: Tensor, weight: Tensor, bias: Tensor, **given: Any) -> Tensor:
        pairs = [[given.get(n, d)] * 2 for n, d in (("stride", 1), ("padding", 0), ("dilation", 1))]
        groups, residual = given.get("groups", 1), given.get("residual")
        if residual is None:
            return torch.cudnn_convolution_relu(input, weight, bias, *pairs, groups)
        return torch.cudnn_convolution_add_relu(input, weight, residual, 1, bias, *pairs, groups)

    return {"cudnn": cudnn}


# What else torch has, by name, for calls like the one given.
RIVALS: dict[Any, Callable[["partial[Any]", bool], dict[str, Form]]] = {
    FF.linear: linear_rivals,
    FF.linear_cross_entropy: chunked_rivals,
    FF.conv2d: conv_rivals,
    FF.scaled_dot_product_attention: attention_rivals,
    FF.varlen_attn: varlen_rivals,
}
