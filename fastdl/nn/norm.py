"""Normalization modules."""

from torch import Tensor, nn

from .. import functional as F


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` on the fused kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` on the fused kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)
