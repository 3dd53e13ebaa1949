"""Embedding tables."""

from torch import Tensor, nn

from .. import functional as F


class Embedding(nn.Embedding):
    """:class:`torch.nn.Embedding` on the fused kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type,
            self.scale_grad_by_freq, self.sparse,
        )  # fmt: skip
