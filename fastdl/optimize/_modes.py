"""The modes of a proof: float64 for the judge; no dropout and the same random numbers for all."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}

_CASTS = {
    Tensor.float: Tensor.double,
    Tensor.half: Tensor.double,
    Tensor.bfloat16: Tensor.double,
}

# Makers of tensors whose dtype may come from an array, whose values float64 holds exactly.
_SOURCES = {torch.tensor, torch.as_tensor, torch.asarray}


class Float64(TorchFunctionMode):
    """Turns casts to narrower floats into casts to float64, and notes who gives one anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow: str | None = None

    def __enter__(self) -> "Float64":
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.amp.autocast_mode._enter_autocast:
            return func(*args)  # it takes no float64, and leaves what is float64 alone
        func = _CASTS.get(func, func)
        args, kwargs = tree_map(_widened_dtype, (args, kwargs or {}))
        if func in _GROUPED:
            return _grouped_mm(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _SOURCES:
            return widened(result)
        if self.narrow is None:
            results = result if isinstance(result, (tuple, list)) else (result,)
            if any(map(_is_narrow, results)):
                self.narrow = resolve_name(func) or getattr(func, "__name__", str(func))
        return result


# Of mixtures of experts. torch's does not take float64; torch 2.11 has it under one name only.
_GROUPED = {getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)} - {None}


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """torch's product of groups of rows, each with its own matrix; `offs` are the groups' ends."""
    if offs is None:
        y = a @ b
    else:
        ends = offs.tolist()
        rows = zip([0, *ends], ends, b, strict=False)
        y = torch.cat([*(a[start:end] @ matrix for start, end, matrix in rows)])
        y = F.pad(y, (0, 0, 0, len(a) - len(y)))  # rows of no group
    y = y if bias is None else y + bias
    return y if out_dtype is None else y.to(out_dtype)


def _widened_dtype(value: Any) -> Any:
    return WIDER.get(value, value) if isinstance(value, torch.dtype) else value


_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout,
}  # fmt: skip

# Random numbers depend on the dtype in which they are drawn.
_MAKERS = {torch.randn, torch.rand, torch.normal, torch.randn_like, torch.rand_like}
_DRAWS = {
    torch.bernoulli, Tensor.bernoulli, torch.poisson, torch.multinomial, Tensor.multinomial,
    F.gumbel_softmax, F.rrelu, torch.rrelu,
}  # fmt: skip
_FILLS = {
    Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.bernoulli_, Tensor.cauchy_,
    Tensor.log_normal_, Tensor.geometric_,
}  # fmt: skip


_REQUIRE = Tensor.requires_grad.__set__  # type: ignore[attr-defined]


class Steady(TorchFunctionMode):
    """Calls torch's functional dropouts with p = 0, and draws random numbers in float64, so that
    those of the judge are those of the models.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == _REQUIRE and args[1] and args[0].requires_grad:
            return None  # torch refuses it for inputs that are no leaves, as a proof's are
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        if func in _FILLS and _is_narrow(args[0]):
            return args[0].copy_(func(widened(args[0]), *args[1:], **kwargs))
        if (func in _MAKERS or func in _DRAWS) and kwargs.get("out") is None:
            return _drawn(func, args, kwargs)
        return func(*args, **kwargs)


def _drawn(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """What a function draws in float64, in the dtype that it would give."""
    given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    dtype = kwargs.get("dtype") or (torch.get_default_dtype() if given is None else given.dtype)
    args, kwargs = tree_map(widened, (args, kwargs))
    if func in _MAKERS and (given is None or func is not torch.normal):
        kwargs["dtype"] = WIDER.get(dtype, dtype)
    drawn: Tensor = func(*args, **kwargs)
    return drawn.to(dtype) if drawn.is_floating_point() or drawn.is_complex() else drawn


def widen(model: nn.Module) -> nn.Module:
    """Put a model into float64, with the tensors that its modules hold as plain attributes."""
    model._apply(widened)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in _TABLES and any(_is_narrow(leaf) for leaf in tree_leaves(value)):
                setattr(module, name, tree_map(widened, value))
    return model


# Where nn.Module keeps what _apply has seen.
_TABLES = ("_parameters", "_buffers", "_modules")


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in WIDER


def widened(value: Any) -> Any:
    return value.to(WIDER[value.dtype]) if _is_narrow(value) else value
