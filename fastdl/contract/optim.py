"""Steps of optimizers that are compiled and timed. They have no gradients, so no contract: what they compute is held against torch's optimizers in tests/test_optim.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..optim import SGD, AdamW
from .case import BenchCase, Maker


@dataclass(frozen=True)
class StepSpec:
    """An optimizer: the steps that are timed, and in `variants` more ways to take one.

    `make(t)` of both returns a step; that of the timed ones takes another class of optimizer, too.
    """

    name: str
    # the name of torch's class, and of ours
    reference: str
    bench: Sequence[BenchCase]
    variants: Sequence[Callable[[Maker], "partial[Any]"]]


def steps(
    default: Any, shapes: Sequence[tuple[int, ...]], scaled: bool = False, **options: Any
) -> Any:
    def make(t: Maker, cls: Any = default) -> "partial[Any]":
        params = [nn.Parameter(t.values(shape)) for shape in shapes]
        for p in params:
            p.grad = t.values(p.shape)
        optimizer = cls(params, **options)
        if scaled:
            optimizer.grad_scale = torch.ones((), device=t.device)
            optimizer.found_inf = torch.zeros((), device=t.device)
        return partial(optimizer.step)

    return make


LARGE = [(8192, 8192)]
# the layers of GPT-2, 124 million parameters in 148 tensors
LAYER = [
    (768,),
    (768,),
    (2304, 768),
    (2304,),
    (768, 768),
    (768,),
    (768,),
    (768,),
    (3072, 768),
    (3072,),
    (768, 3072),
    (768,),
]
GPT2 = [(50257, 768), (1024, 768), *(shape for _ in range(12) for shape in LAYER), (768,), (768,)]
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
MOMENTUM: dict[str, Any] = {"momentum": 0.9, "nesterov": True}
SMALL = [(1000,)]


def elements(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


STEPS: dict[str, StepSpec] = {
    spec.name: spec
    for spec in (
        StepSpec(
            "adamw",
            "AdamW",
            [
                # parameter, gradient and two moments are read, all but the gradient written
                BenchCase("64M fp32", steps(AdamW, LARGE), 28 * elements(LARGE), 0, FLOAT32),
                BenchCase("64M bf16", steps(AdamW, LARGE), 14 * elements(LARGE), 0, BFLOAT16),
                BenchCase("gpt2 fp32", steps(AdamW, GPT2), 28 * elements(GPT2), 0, FLOAT32),
            ],
            [
                steps(
                    AdamW,
                    SMALL,
                    scaled=True,
                    capturable=True,
                    amsgrad=True,
                    clip_grad_norm=1.0,
                    maximize=True,
                ),
                steps(
                    AdamW,
                    SMALL,
                    scaled=True,
                    capturable=True,
                    amsgrad=True,
                    clip_grad_norm=1.0,
                    master_weights=True,
                ),
                steps(AdamW, SMALL, master_weights=True),
                steps(AdamW, SMALL, amsgrad=True),
            ],
        ),
        StepSpec(
            "sgd",
            "SGD",
            [
                BenchCase(
                    "64M fp32 momentum",
                    steps(SGD, LARGE, **MOMENTUM),
                    20 * elements(LARGE),
                    0,
                    FLOAT32,
                ),
                BenchCase("64M bf16", steps(SGD, LARGE), 6 * elements(LARGE), 0, BFLOAT16),
            ],
            [
                steps(SGD, SMALL, scaled=True, clip_grad_norm=1.0, momentum=0.9, maximize=True),
                steps(SGD, SMALL, scaled=True, clip_grad_norm=1.0, master_weights=True, **MOMENTUM),
                steps(SGD, SMALL, master_weights=True),
                steps(SGD, SMALL, momentum=0.9, dampening=0.1),
            ],
        ),
    )
}
