"""Softmax modules."""

from torch import Tensor, nn

from .. import functional as F


class Softmax(nn.Softmax):
    """:class:`torch.nn.Softmax` on the fused kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(nn.LogSoftmax):
    """:class:`torch.nn.LogSoftmax` on the fused kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)


class Softmin(nn.Softmin):
    """:class:`torch.nn.Softmin` on the fused kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmin(input, self.dim, _stacklevel=5)


class Softmax2d(nn.Softmax2d):
    """:class:`torch.nn.Softmax2d` on the fused kernel."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4):
            raise ValueError(f"softmax2d: input has {input.dim()} dimensions, allowed are 3 and 4")
        return F.softmax(input, -3, _stacklevel=5)
