"""The two-layer perceptron: act(x W1ᵀ + b1) W2ᵀ + b2."""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .activation import Activations
from .linear import linear


def mlp(
    input: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: Activations = "gelu",
    recompute: bool = False,
) -> Tensor:
    """act(input W1ᵀ + b1) W2ᵀ + b2. With `recompute`, backward computes the hidden layer again
    instead of keeping it.
    """
    if recompute:
        return checkpoint(_mlp, input, w1, b1, w2, b2, activation, use_reentrant=False)
    return _mlp(input, w1, b1, w2, b2, activation)


def _mlp(
    input: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: Activations,
) -> Tensor:
    return linear(linear(input, w1, b1, activation=activation), w2, b2)
