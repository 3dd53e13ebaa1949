"""Loss modules."""

from torch import Tensor, nn

from .. import functional as F

__all__ = ["CrossEntropyLoss", "NLLLoss"]


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` on the fused kernel."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip


class NLLLoss(nn.NLLLoss):
    """:class:`torch.nn.NLLLoss` on the fused kernel."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(
            input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


# torch has it since 2.13
if hasattr(nn, "LinearCrossEntropyLoss"):
    __all__.append("LinearCrossEntropyLoss")

    class LinearCrossEntropyLoss(nn.LinearCrossEntropyLoss):
        """:class:`torch.nn.LinearCrossEntropyLoss`, whose logits are never whole."""

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            linear, dims = self.linear, (self.num_classes, *self.out_features)
            return F.linear_cross_entropy(
                input, linear.weight.reshape(*dims, linear.in_features), target,
                linear_bias=None if linear.bias is None else linear.bias.reshape(dims),
                weight=self.weight, reduction=self.reduction, ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing, options=self.options,
            )  # fmt: skip
