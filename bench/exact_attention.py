"""Attention with inputs for which softmax is exact, bit by bit against fp64.

Every key has a code, which it shares with one other key, and every query asks for a code. Products
are 0 where they agree; where not, exponentials are 0 in fp32. So probabilities are 1 and 1/2.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdl
import fastdl.functional as FF
from bench.exact import REPEATS, described, fewest_and_most_splits, fp32_products, named, verdict
from bench.machine import as_tuple, poisoned
from fastdl.tuned import Config, Device, forced
from fastdl.tuned.choose import configs

# What codes in queries and keys are multiplied by: 2**7 times the scale of 1/2 for a digit that
# differs, and e**-128 is 0 in fp32.
OF_QUERY, OF_KEY, SCALE = 8, 16, 0.5
# Gradients of logits are quarters of whole numbers up to here, which bfloat16 holds.
LARGEST = 255

# The kernel of each op, and the gradients that it computes.
KERNELS = {
    "attention": ("attention_fwd", ()),
    "attention_dq": ("attention_dq", ("q",)),
    "attention_dkdv": ("attention_dkdv", ("k", "v")),
    "attention_dbias": ("attention_dbias", ("bias",)),
}
PASSES = ("attention", "attention_dq", "attention_dkdv")


class Shape(NamedTuple):
    """Sizes and options. Keys of one code are `apart`; bias and slopes are there, and 0."""

    name: str
    B: int
    H: int
    kv: int
    Sq: int
    Sk: int
    D: int
    apart: int = 97
    window: tuple[int, int] = (-1, -1)
    bias: tuple[int, ...] = ()
    slopes: bool = False
    ops: Sequence[str] = PASSES

    @property
    def group(self) -> int:
        return self.H // self.kv

    @property
    def tuned(self) -> bool:
        """Tables are for plain products alone."""
        return not (self.bias or self.slopes)


SHAPES = (
    Shape("tails", 2, 4, 2, 300, 272, 64),
    Shape("causal", 1, 4, 4, 2048, 2048, 128, window=(-1, 0)),
    Shape("window", 1, 4, 2, 700, 700, 64, window=(200, 60)),
    Shape("wide", 1, 2, 2, 260, 300, 256),
    Shape("odd head", 1, 2, 2, 260, 300, 72, window=(-1, 0)),
    Shape("decoding", 2, 8, 2, 1, 8192, 128, apart=4096, ops=PASSES[:1]),
    Shape("bias", 2, 2, 2, 300, 300, 64, bias=(1, 2, 300, 300), ops=tuple(KERNELS)),
    Shape("bias of keys", 2, 4, 2, 200, 300, 128, bias=(1, 1, 1, 300), ops=tuple(KERNELS)),
    Shape("bias, slopes", 1, 2, 2, 300, 300, 128, window=(-1, 0), bias=(1, 2, 300, 300),
          slopes=True, ops=tuple(KERNELS)),
)  # fmt: skip
# Blocks of float32 are others, those of float16 are the same.
OF_FLOAT32, OF_FLOAT16 = ("tails", "causal", "decoding"), ("tails",)


class ExactAttention(NamedTuple):
    """One configuration of one kernel at one shape; None is what the op chooses."""

    op: str
    dtype: torch.dtype
    tf32: bool
    config: Config | None
    shape: Shape

    @property
    def name(self) -> str:
        how = described(self.config) if self.config else "as chosen"
        return f"{self.op} {named(self.dtype, self.tf32)} {self.shape.name} {how}"

    @property
    def sizes(self) -> tuple[int, int]:
        """What tables know it by: rows, those of heads that share a block together, and columns."""
        together = self.op in ("attention", "attention_dq")
        return min(self.shape.Sq * (self.shape.group if together else 1), 128), self.shape.D


def attention_cases(facts: Device) -> Iterator[ExactAttention]:
    by_name = {shape.name: shape for shape in SHAPES}
    of16, of32 = ([by_name[name] for name in names] for names in (OF_FLOAT16, OF_FLOAT32))
    kinds = ((torch.bfloat16, False, SHAPES), (torch.float16, False, of16))
    kinds += ((torch.float32, False, of32), (torch.float32, True, of32))
    for dtype, tf32, of_kind in kinds:
        for shape in of_kind:
            for op in shape.ops:
                case = ExactAttention(op, dtype, tf32, None, shape)
                yield case
                if shape.tuned:
                    found = configs(op, dtype, case.sizes, facts)
                    yield from (case._replace(config=c) for c in fewest_and_most_splits(found))


def check_attention(case: ExactAttention, device: str, repeats: int = REPEATS) -> dict[str, Any]:
    """Compare with the definition in fp64, bit by bit, so many times."""
    given = agreeing(case.shape, case.dtype, device)
    want = [x.to(case.dtype) for x in result(case, given, torch.float64)()]
    assert all(x.any() for x in want), "these inputs would show nothing"
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    with (
        fastdl.policy("fused", on_fallback="error"),
        forced_or_chosen(case),
        fp32_products(case.tf32),
        torch.autograd.set_multithreading_enabled(False),  # launches are recorded by thread
        poisoned(),
    ):
        call = result(case, given, case.dtype)
        kernel = KERNELS[case.op][0]
        launches = fastdl.explain(call).launches
        launched = next(launch for launch in launches if launch.kernel.name == kernel)
        if case.config not in (None, launched.config):
            return {"ok": False, "says": f"launched as {launched}"}
        for _ in range(repeats):
            for got, exact in zip(call(), want, strict=True):
                wrong += (got != exact).sum()
    return {**verdict(int(wrong), repeats), "launched": str(launched)}


def forced_or_chosen(case: ExactAttention) -> Any:
    if case.config is None:
        return nullcontext()
    return forced(case.op, case.dtype, case.sizes, case.config)


def result(case: ExactAttention, given: dict[str, Any], dtype: torch.dtype) -> Callable[[], Any]:
    """A call that gives what the kernel computes: the output, or some of the gradients."""
    tensors = {n: x.to(dtype) if n != "slopes" else x for n, x in given.items() if x is not None}
    do, wanted = tensors.pop("do"), [tensors[name] for name in KERNELS[case.op][1]]
    for leaf in wanted:
        leaf.requires_grad_()
    call = partial(
        FF.scaled_dot_product_attention,
        tensors["q"], tensors["k"], tensors["v"], tensors.get("bias"), scale=SCALE,
        enable_gqa=case.shape.group > 1, window_size=case.shape.window,
        alibi_slopes=tensors.get("slopes"),
    )  # fmt: skip
    mode = "definition" if dtype == torch.float64 else "fused"
    with fastdl.policy(mode, on_fallback="error"):
        o = call()
    if not wanted:
        return lambda: as_tuple(call() if mode == "fused" else o)
    return lambda: torch.autograd.grad(o, wanted, do, retain_graph=True)


def agreeing(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Columns are a code, a constant, numbers of keys alone, and numbers of queries alone."""
    generator = torch.Generator().manual_seed(0)
    B, H, kv, Sq, Sk, D = shape[1:7]
    digits, own = D // 2 - 1, D // 4

    def draw(*size: int, most: int, keep: float = 1.0) -> Tensor:
        values = torch.randint(-most, most + 1, size, generator=generator)
        return values * (torch.rand(size, generator=generator) < keep)

    def columns(code: Tensor, constant: int, *numbers: Tensor) -> Tensor:
        rows = code.shape[:-1]
        parts = (code, torch.full((*rows, 1), constant), *(x.expand(*rows, -1) for x in numbers))
        return torch.cat(parts, -1).to(dtype).to(device)

    place, none = torch.arange(Sk), torch.zeros(1, dtype=torch.long)
    number = place // (2 * shape.apart) * shape.apart + place % shape.apart
    codes = different(int(number.max()) + 1, digits, generator)[number]
    q = columns(OF_QUERY * codes[asked_for(shape, generator)], -OF_QUERY * digits,
                none.expand(own), draw(B, H, Sq, D - digits - 1 - own, most=2))  # fmt: skip
    k = columns(OF_KEY * codes.expand(B, kv, Sk, digits), OF_KEY,
                draw(B, kv, Sk, own, most=2), none.expand(D - digits - 1 - own))  # fmt: skip
    v, do = draw(B, kv, Sk, D, most=3, keep=0.5), draw(B, H, Sq, D, most=2, keep=0.25)
    v, do = (x.to(dtype).to(device) for x in (v, do))
    dp = do.double() @ v.double().repeat_interleave(shape.group, 1).mT
    assert dp.max() - dp.min() <= LARGEST, "the inputs are too large to be exact"
    bias = torch.zeros(shape.bias, dtype=dtype, device=device) if shape.bias else None
    slopes = torch.zeros(H, device=device) if shape.slopes else None
    return {"q": q, "k": k, "v": v, "do": do, "bias": bias, "slopes": slopes}


def different(n: int, digits: int, generator: torch.Generator) -> Tensor:
    """Codes of -1 and 1: the number in binary, and noise."""
    bits = (n - 1).bit_length()
    assert bits <= digits, f"{n} codes have no room in {digits} columns"
    binary = torch.arange(n)[:, None] >> torch.arange(bits) & 1
    noise = torch.randint(0, 2, (n, digits - bits), generator=generator)
    return 2 * torch.cat([binary, noise], -1) - 1


def asked_for(shape: Shape, generator: torch.Generator) -> Tensor:
    """For each query a key that it sees."""
    (left, right), i = shape.window, torch.arange(shape.Sq)
    low = (i - left).clamp(0, shape.Sk - 1) if left >= 0 else 0 * i
    high = (i + right).clamp(0, shape.Sk - 1) if right >= 0 else 0 * i + shape.Sk - 1
    share = torch.rand(shape.B, shape.H, shape.Sq, generator=generator)
    return (low + share * (high - low + 1)).long().minimum(high)
