"""Activations and their derivatives, on fp32 values in registers.

ACT names the activation; `a` and `b` are its parameters (slope, alpha, beta and threshold, bounds).
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # (1 - e) / (1 + e) loses all digits near 0, where the series is exact in fp32
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    near = x * (1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0."""
    near = x * (1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return tl.where(x > -0.25, near, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0; the quotient undoes the rounding of 1 + x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def softplus(x):
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def clamp(x, low, high):
    # comparisons with NaN are false, so NaN stays NaN, as in torch
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def gelu_tanh_inner(x):
    return 0.7978845608028654 * (x + 0.044715 * x * x * x)


@triton.jit
def mish_ratio(x):
    """n with tanh(softplus(x)) = n / (n + 2); beyond 20 the ratio is 1 in fp32."""
    e = tl.exp(tl.where(x > 20.0, 20.0, x))
    return e * (e + 2.0)


@triton.jit
def activate(x, ACT: tl.constexpr, a, b):
    """The activation ACT of x."""
    if ACT == "none":
        return x
    elif ACT == "relu":
        return tl.where(x < 0, 0.0, x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(gelu_tanh_inner(x)))
    elif ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    elif ACT == "relu2":
        return tl.where(x < 0, 0.0, x * x)
    elif ACT == "sigmoid":
        return tl.sigmoid(x)
    elif ACT == "tanh":
        return tanh(x)
    elif ACT == "leaky_relu":
        return tl.where(x > 0, x, a * x)
    elif ACT == "elu":
        return tl.where(x > 0, x, a * expm1(x))
    elif ACT == "selu":
        return 1.0507009873554805 * tl.where(x > 0, x, 1.6732632423543772 * expm1(x))
    elif ACT == "celu":
        return tl.where(x > 0, x, a * expm1(x / a))
    elif ACT == "mish":
        n = mish_ratio(x)
        return x * (n / (n + 2.0))
    elif ACT == "softplus":
        return tl.where(x * a > b, x, softplus(x * a) / a)
    elif ACT == "softsign":
        return x / (1.0 + tl.abs(x))
    elif ACT == "hardswish":
        return x * clamp(x + 3.0, 0.0, 6.0) / 6.0
    elif ACT == "hardsigmoid":
        return clamp(x + 3.0, 0.0, 6.0) / 6.0
    elif ACT == "hardtanh":
        return clamp(x, a, b)
    elif ACT == "logsigmoid":
        return -softplus(-x)
    else:
        tl.static_assert(ACT == "tanhshrink", "unknown activation")
        return x - tanh(x)


@triton.jit
def derivative(x, ACT: tl.constexpr, a, b):
    """The derivative of the activation ACT at x."""
    if ACT == "none":
        return x * 0.0 + 1.0
    elif ACT == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    elif ACT == "gelu":
        bell = tl.exp(-0.5 * x * x) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * bell
    elif ACT == "gelu_tanh":
        t = tanh(gelu_tanh_inner(x))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope
    elif ACT == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACT == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        return s * (1.0 + 1.702 * x * (1.0 - s))
    elif ACT == "relu2":
        return tl.where(x < 0, 0.0, 2.0 * x)
    elif ACT == "sigmoid":
        s = tl.sigmoid(x)
        return s * (1.0 - s)
    elif ACT == "tanh":
        t = tanh(x)
        return 1.0 - t * t
    elif ACT == "leaky_relu":
        return tl.where(x > 0, 1.0, a)
    elif ACT == "elu":
        return tl.where(x > 0, 1.0, a * tl.exp(x))
    elif ACT == "selu":
        return 1.0507009873554805 * tl.where(x > 0, 1.0, 1.6732632423543772 * tl.exp(x))
    elif ACT == "celu":
        return tl.where(x > 0, 1.0, tl.exp(x / a))
    elif ACT == "mish":
        n = mish_ratio(x)
        return n / (n + 2.0) + x * tl.sigmoid(x) * (4.0 * (n + 1.0) / ((n + 2.0) * (n + 2.0)))
    elif ACT == "softplus":
        return tl.where(x * a > b, 1.0, tl.sigmoid(x * a))
    elif ACT == "softsign":
        d = 1.0 + tl.abs(x)
        return 1.0 / (d * d)
    elif ACT == "hardswish":
        return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x / 3.0 + 0.5, 1.0))
    elif ACT == "hardsigmoid":
        return tl.where((x > -3.0) & (x < 3.0), 1 / 6, 0.0)
    elif ACT == "hardtanh":
        return tl.where((x <= a) | (x >= b), 0.0, 1.0)
    elif ACT == "logsigmoid":
        return tl.sigmoid(-x)
    else:
        tl.static_assert(ACT == "tanhshrink", "unknown activation")
        t = tanh(x)
        return t * t
