"""Loss modules."""

from torch import Tensor, nn

from .. import functional as F


class MSELoss(nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class L1Loss(nn.L1Loss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(nn.SmoothL1Loss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(nn.HuberLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class KLDivLoss(nn.KLDivLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


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
