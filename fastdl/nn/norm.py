"""Normalization modules."""

from typing import Any

from torch import Tensor, nn

from .. import functional as F
from ..ops.activation import Activations


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` on the fused kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` on the fused kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)


class GroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` on the fused kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return run_group_norm(input, self)


class BatchNorm1d(nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on the fused kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return run_batch_norm(input, self)


class BatchNorm2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on the fused kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return run_batch_norm(input, self)


class BatchNorm3d(nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on the fused kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return run_batch_norm(input, self)


class InstanceNorm1d(nn.InstanceNorm1d):
    """:class:`torch.nn.InstanceNorm1d` on the fused kernels."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _run_instance_norm(input, self)


class InstanceNorm2d(nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d` on the fused kernels."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _run_instance_norm(input, self)


class InstanceNorm3d(nn.InstanceNorm3d):
    """:class:`torch.nn.InstanceNorm3d` on the fused kernels."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _run_instance_norm(input, self)


def run_group_norm(
    input: Tensor,
    norm: Any,
    activation: Activations = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """activation(norm(input) (1 + scale) + shift), as one op."""
    return F.group_norm(
        input, norm.num_groups, norm.weight, norm.bias, norm.eps,
        activation=activation, scale=scale, shift=shift,
    )  # fmt: skip


def run_batch_norm(
    input: Tensor, norm: Any, activation: Activations = None, residual: Tensor | None = None
) -> Tensor:
    """activation(norm(input) + residual), as one op."""
    given = batch_norm_arguments(input, norm)
    return F.batch_norm(input, *given, activation=activation, residual=residual)


def batch_norm_arguments(input: Tensor, norm: Any) -> tuple[Any, ...]:
    """What `batch_norm` takes after its input. Counts batches as torch's module does."""
    norm._check_input_dim(input)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the mean of all batches so far
            momentum = 1.0 / float(norm.num_batches_tracked)
    mean, var = norm.running_mean, norm.running_var
    own = norm.training or (mean is None and var is None)
    if norm.training and not norm.track_running_stats:
        mean = var = None
    return mean, var, norm.weight, norm.bias, own, momentum, norm.eps


def _run_instance_norm(input: Tensor, norm: Any) -> Tensor:
    return F.instance_norm(
        input, norm.running_mean, norm.running_var, norm.weight, norm.bias,
        norm.training or not norm.track_running_stats,
        0.0 if norm.momentum is None else norm.momentum, norm.eps,
    )  # fmt: skip
