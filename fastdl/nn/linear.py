"""Linear layers and the perceptrons made of them."""

from typing import Any

from torch import Tensor, nn

from .. import functional as F
from ..ops.activation import Activations


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` on the fused kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class MLP(nn.Module):
    """fc2(act(fc1(x))): two linear layers with an activation between them."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: Activations = "gelu",
        bias: bool = True,
        recompute: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias, device, dtype)
        self.activation, self.recompute = activation, recompute

    def forward(self, input: Tensor) -> Tensor:
        return F.mlp(
            input,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            activation=self.activation,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, recompute={self.recompute}"


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj(x)) up_proj(x)): a perceptron with a gate."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: Activations = "silu",
        bias: bool = True,
        recompute: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.up_proj = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.down_proj = nn.Linear(
            hidden_features, out_features or in_features, bias, device, dtype
        )
        self.activation, self.recompute = activation, recompute

    def forward(self, input: Tensor) -> Tensor:
        return F.gated_mlp(
            input,
            self.gate_proj.weight,
            self.up_proj.weight,
            self.down_proj.weight,
            self.gate_proj.bias,
            self.up_proj.bias,
            self.down_proj.bias,
            activation=self.activation,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, recompute={self.recompute}"
