"""The activations under torch's names and signatures, with dropout as a keyword."""

import torch.nn.functional as F
from torch import Tensor

from .activation import activation, dropout


def gelu(
    input: Tensor, approximate: str = "none", *, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"gelu: approximate is {approximate!r}, allowed are 'none' and 'tanh'")
    name = "gelu" if approximate == "none" else "gelu_tanh"
    return activation(input, name, dropout_p=dropout_p, training=training)


def relu(
    input: Tensor, inplace: bool = False, *, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    if inplace:
        input = F.relu(input, inplace=True)
        return dropout(input, dropout_p, training)
    return activation(input, "relu", dropout_p=dropout_p, training=training)


def silu(
    input: Tensor, inplace: bool = False, *, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    if inplace:
        input = F.silu(input, inplace=True)
        return dropout(input, dropout_p, training)
    return activation(input, "silu", dropout_p=dropout_p, training=training)


def leaky_relu(
    input: Tensor,
    negative_slope: float = 0.01,
    inplace: bool = False,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    if inplace:
        input = F.leaky_relu(input, negative_slope, inplace=True)
        return dropout(input, dropout_p, training)
    return activation(input, ("leaky_relu", negative_slope), dropout_p=dropout_p, training=training)


def elu(
    input: Tensor,
    alpha: float = 1.0,
    inplace: bool = False,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    if inplace:
        input = F.elu(input, alpha, inplace=True)
        return dropout(input, dropout_p, training)
    return activation(input, ("elu", alpha), dropout_p=dropout_p, training=training)


def selu(
    input: Tensor, inplace: bool = False, *, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    if inplace:
        input = F.selu(input, inplace=True)
        return dropout(input, dropout_p, training)
    return activation(input, "selu", dropout_p=dropout_p, training=training)


def celu(
    input: Tensor,
    alpha: float = 1.0,
    inplace: bool = False,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    if inplace:
        input = F.celu(input, alpha, inplace=True)
        return dropout(input, dropout_p, training)
    return activation(input, ("celu", alpha), dropout_p=dropout_p, training=training)


def mish(
    input: Tensor, inplace: bool = False, *, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    if inplace:
        input = F.mish(input, inplace=True)
        return dropout(input, dropout_p, training)
    return activation(input, "mish", dropout_p=dropout_p, training=training)


def hardswish(
    input: Tensor, inplace: bool = False, *, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    if inplace:
        input = F.hardswish(input, inplace=True)
        return dropout(input, dropout_p, training)
    return activation(input, "hardswish", dropout_p=dropout_p, training=training)


def hardsigmoid(
    input: Tensor, inplace: bool = False, *, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    if inplace:
        input = F.hardsigmoid(input, inplace=True)
        return dropout(input, dropout_p, training)
    return activation(input, "hardsigmoid", dropout_p=dropout_p, training=training)


def hardtanh(
    input: Tensor,
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    if min_val > max_val:
        raise ValueError(f"hardtanh: min_val is {min_val}, max_val {max_val}; it must not be less")
    if inplace:
        input = F.hardtanh(input, min_val, max_val, inplace=True)
        return dropout(input, dropout_p, training)
    return activation(input, ("hardtanh", min_val, max_val), dropout_p=dropout_p, training=training)


def relu6(
    input: Tensor, inplace: bool = False, *, dropout_p: float = 0.0, training: bool = True
) -> Tensor:
    if inplace:
        input = F.relu6(input, inplace=True)
        return dropout(input, dropout_p, training)
    return activation(input, "relu6", dropout_p=dropout_p, training=training)


def sigmoid(input: Tensor, *, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    return activation(input, "sigmoid", dropout_p=dropout_p, training=training)


def tanh(input: Tensor, *, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    return activation(input, "tanh", dropout_p=dropout_p, training=training)


def softsign(input: Tensor, *, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    return activation(input, "softsign", dropout_p=dropout_p, training=training)


def logsigmoid(input: Tensor, *, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    return activation(input, "logsigmoid", dropout_p=dropout_p, training=training)


def tanhshrink(input: Tensor, *, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    return activation(input, "tanhshrink", dropout_p=dropout_p, training=training)


def softplus(
    input: Tensor,
    beta: float = 1,
    threshold: float = 20,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    return activation(input, ("softplus", beta, threshold), dropout_p=dropout_p, training=training)


def quick_gelu(input: Tensor, *, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    return activation(input, "quick_gelu", dropout_p=dropout_p, training=training)


def relu2(input: Tensor, *, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    return activation(input, "relu2", dropout_p=dropout_p, training=training)


def gelu_tanh(input: Tensor, *, dropout_p: float = 0.0, training: bool = True) -> Tensor:
    return activation(input, "gelu_tanh", dropout_p=dropout_p, training=training)
