"""`fastdl.tune`: measure launch configurations on this GPU and keep the winners in a table."""

import datetime
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from ..ops import _launch, _tuned
from ..ops._launch import Config, Device, cdiv
from ..ops._route import policy

Call = Callable[[], Any]
# Runs the calls in turn, for so many rounds: microseconds of each call in each round.
Measure = Callable[[Mapping[str, Call], int], dict[str, list[float]]]

DEVICE = "cuda"
# torch has to be faster by more than noise.
FAST, COARSE_ROUNDS, FINE_ROUNDS, FINALISTS = 0.98, 3, 15, 3

# All larger numbers of rows of attention have one entry.
MANY = 128


class Problem(NamedTuple):
    """One entry to be found. `truth` is in fp64; `replaceable`: torch can take over this pass."""

    op: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    fused: Call
    torch: Call
    truth: Call
    replaceable: bool = True

    @property
    def key(self) -> str:
        return _tuned.key_of(self.op, self.dtype, self.sizes)


@dataclass(frozen=True)
class Row:
    """What the table will hold, and the time of the best configuration."""

    key: str
    entry: dict[str, Any]
    us: float
    torch_us: float
    tried: int

    def __str__(self) -> str:
        winner = "torch" if self.entry["variant"] == "torch" else _brief(self.entry)
        ratio = self.torch_us / self.us
        return (
            f"{self.key:44} {self.us:9.1f} us {self.torch_us:9.1f} us torch {ratio:6.2f}x  {winner}"
        )


@dataclass(frozen=True)
class Report:
    """Printable, also as JSON. `skipped` says what there was no time for, or went wrong."""

    path: Path
    rows: list[Row]
    skipped: list[str]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "path": str(self.path)}, indent=1)

    def __str__(self) -> str:
        lines = [str(row) for row in self.rows] + [f"skipped: {what}" for what in self.skipped]
        return "\n".join([*lines, f"written to {self.path}"])


def _brief(entry: dict[str, Any]) -> str:
    blocks = " ".join(f"{name}={value}" for name, value in entry["blocks"].items())
    numbers = " ".join(f"{name}={entry[name]}" for name in ("num_warps", "num_stages", "splits"))
    return f"{entry['variant']} {blocks} {numbers}"


def tune(
    ops: str | Iterable[str] | None = None,
    *,
    shapes: Iterable[Sequence[int]] | Mapping[str, Iterable[Sequence[int]]] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    budget_s: float = 60,
    path: str | Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Find the fastest configurations for `shapes` and write them to the user's table, or `path`.

    Shapes are (M, N, K) for "linear", (positions, channels out, channels in, taps) for "conv",
    channels of a group, (columns,) for norms, softmax and their backward passes, and
    (rows, columns) for "attention": queries of the heads that share keys, and columns of a head.
    Where torch is faster at a product, a norm or softmax, the table says so: the op runs in torch.
    """
    plan = _plan(ops, shapes, dtypes)
    device = this_gpu()
    if device is None:
        raise RuntimeError("tune: kernels are measured on a GPU, and there is none to run them")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: a CUDA graph is being captured; tune before that")
    target = Path(path) if path is not None else _tuned.user_file(device.name)
    problems = (PROBLEMS[op](dtype, sizes, DEVICE) for op, dtype, sizes in plan)
    rows, skipped = run(problems, device, events, budget_s, progress=progress)
    if rows:
        _save(target, device, rows)
    return Report(target, rows, skipped)


def this_gpu() -> Device | None:
    if not torch.cuda.is_available() or _launch.INTERPRETED:
        return None
    return _launch.gpu_facts(torch.cuda.current_device())


def _plan(ops: Any, shapes: Any, dtypes: Any) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    asked = [ops] if isinstance(ops, str) else list(DEFAULTS if ops is None else ops)
    names = list(dict.fromkeys(op for name in asked for op in PASSES.get(name, (name,))))
    if shapes is None:
        shapes = DEFAULTS
    elif not isinstance(shapes, Mapping):
        if ops is None:
            raise ValueError("tune: got shapes but no ops; name the op that the shapes are for")
        given = list(shapes)
        shapes = dict.fromkeys(names, given)
    plan: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name in names:
        if name not in DEFAULTS:
            raise ValueError(f"tune: got op {name!r}, allowed are {', '.join(DEFAULTS)}")
        count = len(next(iter(DEFAULTS[name])))
        for sizes in shapes.get(name, ()):
            if len(sizes) != count or min(sizes) < 1:
                raise ValueError(f"tune: {name} takes {count} positive sizes, got {tuple(sizes)}")
            plan += [(name, d, tuple(sizes)) for d in dtypes or (torch.bfloat16, torch.float16)]
    return plan


def run(
    problems: Iterable[Problem],
    device: Device,
    measure: Measure,
    budget_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], list[str]]:
    """Solve problems until the budget is spent."""
    until, rows, skipped = clock() + budget_s, [], []
    for problem in problems:
        if clock() >= until:
            skipped.append(f"{problem.key}: no time left")
            continue
        row = search(problem, device, measure, lambda: clock() >= until)
        if row is None:
            skipped.append(f"{problem.key}: no configuration ran and was right")
            continue
        rows.append(row)
        progress(f"{row}  {max(until - clock(), 0):.0f} s left")
    return rows, skipped


def search(
    problem: Problem, device: Device, measure: Measure, late: Callable[[], bool]
) -> Row | None:
    """The fastest of those configurations that compute the right thing, against torch."""
    truth = problem.truth()
    allowed = 2 * _error(problem.torch(), truth) + 1e-6
    proven: dict[str, Config] = {}
    tried = configs(problem.op, problem.dtype, problem.sizes, device)
    for number, config in enumerate(tried):
        if proven and late():
            break
        if _is_right(problem, config, truth, allowed):
            proven[str(number)] = config
    if not proven:
        return None
    calls = {name: _launching(problem, config) for name, config in proven.items()}
    coarse = _medians(measure(calls, COARSE_ROUNDS))
    finalists = sorted(coarse, key=coarse.__getitem__)[:FINALISTS]
    fine = measure({"torch": problem.torch, **{n: calls[n] for n in finalists}}, FINE_ROUNDS)
    medians = _medians(fine)
    best = min(finalists, key=medians.__getitem__)
    entry = _entry(proven[best])
    if problem.replaceable and medians["torch"] < FAST * medians[best]:
        entry = {"blocks": {}, "variant": "torch"}
    return Row(problem.key, entry, medians[best], medians["torch"], len(proven))


def configs(
    op: str, dtype: torch.dtype, sizes: tuple[int, ...], device: Device
) -> Iterator[Config]:
    """The candidates of the op, those that can slice K also in slices that fill the device."""
    for config in _tuned.CANDIDATES[op](dtype, sizes, device):
        yield config
        if config.variant != "tiles":
            continue
        M, N, K = sizes
        tiles = cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])
        for splits in (2, 4, 8, 16):
            blocks_of_k = K // config["BLOCK_K"]
            if tiles * splits <= 2 * device.sms and blocks_of_k >= 2 * splits:
                yield replace(config, splits=splits)


def _launching(problem: Problem, config: Config) -> Call:
    def call() -> Any:
        with _forced(problem, config):
            return problem.fused()

    return call


@contextmanager
def _forced(problem: Problem, config: Config) -> Iterator[None]:
    with (
        policy("fused", on_fallback="error"),
        _tuned.forced(problem.op, problem.dtype, problem.sizes, config),
    ):
        yield


def _is_right(problem: Problem, config: Config, truth: Any, allowed: float) -> bool:
    try:
        return _error(_launching(problem, config)(), truth) <= allowed
    except Exception as error:
        if "CUDA error" in str(error):
            raise  # the device is lost, and would take the blame for all that follow
        return False  # it does not fit this device, which Triton's versions say in many words


def _error(got: Any, truth: Any) -> float:
    """Relative error of the worst of the tensors; inf where it is not a number."""
    pairs = zip(_tensors(got), _tensors(truth), strict=True)
    worst = max(float((g.double() - t).norm() / t.norm().clamp_min(1e-30)) for g, t in pairs)
    return worst if worst == worst else float("inf")


def _tensors(value: Any) -> Sequence[Tensor]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def _entry(config: Config) -> dict[str, Any]:
    entry = asdict(config)
    del entry["source"]
    return {**entry, "blocks": dict(config.blocks)}


def events(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """By CUDA events, each call after a sweep of memory: it empties the L2 and hides the launch."""
    sweep = torch.empty(512 << 20, dtype=torch.int8, device="cuda")
    marks: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            sweep.zero_()
            start.record()
            call()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [1e3 * a.elapsed_time(b) for a, b in pairs] for name, pairs in marks.items()}


def _save(path: Path, device: Device, rows: list[Row]) -> None:
    """Add to what is there: entries of other shapes stay."""
    from .._env import env

    versions = {name: version for name, version in env().versions.items() if version}
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    entries = {**_tuned.read(path), **{row.key: row.entry for row in rows}}
    _tuned.write(path, device.name, {**versions, "date": today}, entries)


def _linear(dtype: torch.dtype, sizes: tuple[int, ...], device: str) -> Problem:
    M, N, K = sizes
    x, w = _normal(M, K, dtype=dtype, device=device), _normal(N, K, dtype=dtype, device=device)
    w, b = w / K**0.5, _normal(N, dtype=dtype, device=device)
    return Problem(
        "linear", dtype, sizes,
        lambda: FF.linear(x, w, b, activation="gelu"),
        lambda: F.gelu(F.linear(x, w, b)),
        lambda: F.gelu(F.linear(x.double(), w.double(), b.double())),
    )  # fmt: skip


def _conv(last: bool, dtype: torch.dtype, sizes: tuple[int, ...], device: str) -> Problem:
    """Images of 32 by 32, or a line of positions, and a square kernel."""
    positions, outs, channels, taps = sizes
    side, side_of_kernel = (32 if positions >= 1024 else 1), math.isqrt(taps)
    image = (
        (positions // side**2, channels, side, side) if side > 1 else (1, channels, 1, positions)
    )
    x = _normal(*image, dtype=dtype, device=device)
    w = _normal(outs, channels, side_of_kernel, side_of_kernel, dtype=dtype, device=device)
    w, b = w / (taps * channels) ** 0.5, _normal(outs, dtype=dtype, device=device)
    if last:
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    padding = side_of_kernel // 2
    return Problem(
        "conv" if last else "conv_nchw", dtype, sizes,
        lambda: FF.conv2d(x, w, b, padding=padding, activation="relu"),
        lambda: F.relu(F.conv2d(x, w, b, padding=padding)),
        lambda: F.relu(F.conv2d(x.double(), w.double(), b.double(), padding=padding)),
        replaceable=False,
    )  # fmt: skip


def _norm(
    op: str, factors: int, dtype: torch.dtype, sizes: tuple[int, ...], device: str
) -> Problem:
    """A norm with so many factors: a weight, and a bias. Softmax has none."""
    x, *rest = _norm_inputs(factors, dtype, sizes, device)
    fused, torchs, over = getattr(FF, op), getattr(F, op), _over(op, sizes)
    return Problem(
        op, dtype, sizes,
        lambda: fused(x, over, *rest),
        lambda: torchs(x, over, *rest),
        lambda: torchs(x.double(), over, *(t.double() for t in rest)),
    )  # fmt: skip


def _norm_backward(
    op: str, factors: int, dtype: torch.dtype, sizes: tuple[int, ...], device: str
) -> Problem:
    inputs = _norm_inputs(factors, dtype, sizes, device)
    dy = torch.randn_like(inputs[0])

    def gradients(home: Any, wide: bool = False) -> Call:
        leaves = [t.double() if wide else t for t in inputs]
        leaves = [t.detach().requires_grad_() for t in leaves]
        with torch.enable_grad(), policy("fused" if home is FF else "auto"):
            y = getattr(home, op)(leaves[0], _over(op, sizes), *leaves[1:])
        return lambda: torch.autograd.grad(y, leaves, dy.to(y.dtype), retain_graph=True)

    return Problem(
        f"{op}_backward", dtype, sizes,
        gradients(FF), gradients(F), gradients(F, wide=True),
        replaceable=False,
    )  # fmt: skip


def _over(op: str, sizes: tuple[int, ...]) -> Any:
    """How an op is told to go over rows of this size."""
    return -1 if op == "softmax" else sizes


def _norm_inputs(
    factors: int, dtype: torch.dtype, sizes: tuple[int, ...], device: str
) -> list[Tensor]:
    (cols,) = sizes
    # beyond the L2 of any GPU, and a few rows even where they are few
    rows = max((1 << 26) // cols, 64) if device == "cuda" else 5
    shapes = ((rows, cols), *[(cols,)] * factors)
    return [_normal(*shape, dtype=dtype, device=device) for shape in shapes]


_sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention


def _attention(dtype: torch.dtype, sizes: tuple[int, ...], device: str) -> Problem:
    """Many rows: causal prompts. Few: one token of each of the heads that share long keys."""
    (rows, D), small = sizes, device != "cuda"
    if rows < MANY:
        B, kv, group, Sq, Sk = (1, 1, rows, 1, 64) if small else (4, 8, rows, 1, 8192)
    else:
        B, kv, group, Sq, Sk = (1, 1, 1, 65, 65) if small else (4, 16, 1, 2048, 2048)
    q, k, v = _heads(dtype, (B, kv * group, Sq, D), (B, kv, Sk, D), device)

    def call(attention: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return attention(*inputs, is_causal=Sq > 1, enable_gqa=group > 1)

    def truth() -> Tensor:
        return torch.cat(
            [call(_sdpa, *(x[b : b + 1].double() for x in (q, k, v))) for b in range(B)]
        )

    return Problem(
        "attention", dtype, (min(rows, MANY), D),
        lambda: call(FF.scaled_dot_product_attention, q, k, v), lambda: call(_sdpa, q, k, v), truth,
        replaceable=False,
    )  # fmt: skip


def _attention_backward(
    op: str, wanted: slice, dtype: torch.dtype, sizes: tuple[int, ...], device: str
) -> Problem:
    """The gradients that one kernel computes. torch's kernels compute all of them at once."""
    (rows, D), small = sizes, device != "cuda"
    S = rows if rows < MANY else 65 if small else 2048
    B, H = (1, 1) if small else (4, 16)
    inputs = _heads(dtype, (B, H, S, D), (B, H, S, D), device)
    do = torch.randn_like(inputs[0])

    def gradients(attention: Callable[..., Tensor], inputs: list[Tensor], do: Tensor) -> Call:
        leaves = [x.detach().requires_grad_() for x in inputs]

        @functools.cache  # not before it is forbidden to fall back
        def output() -> Tensor:
            with torch.enable_grad():
                return attention(*leaves, is_causal=True)

        return lambda: torch.autograd.grad(output(), leaves[wanted], do, retain_graph=True)

    def truth() -> list[Tensor]:
        wide = [[x[b : b + 1].double() for x in (*inputs, do)] for b in range(B)]
        found = [gradients(_sdpa, rest, do)() for *rest, do in wide]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    return Problem(
        op, dtype, (min(rows, MANY), D),
        gradients(FF.scaled_dot_product_attention, inputs, do), gradients(_sdpa, inputs, do), truth,
        replaceable=False,
    )  # fmt: skip


def _heads(
    dtype: torch.dtype, of_q: tuple[int, ...], of_k: tuple[int, ...], device: str
) -> list[Tensor]:
    return [_normal(*shape, dtype=dtype, device=device) for shape in (of_q, of_k, of_k)]


def _normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _recurrent(op: str, dtype: torch.dtype, sizes: tuple[int, ...], device: str) -> Problem:
    """Both passes of a layer with as many features as units, which one entry decides."""
    T, B, H = sizes
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[op]
    shapes = ((gates * H, H), (gates * H, H), (gates * H,), (gates * H,))
    inputs = [_normal(T, B, H, dtype=dtype, device=device)]
    inputs += [_normal(*shape, dtype=dtype, device=device) / H**0.5 for shape in shapes]
    dy = torch.randn_like(inputs[0])

    def torchs(x: Tensor, hx: None, weights: list[Tensor]) -> Any:
        zeros = x.new_zeros(1, B, H)
        states: Any = (zeros, zeros) if op == "lstm" else zeros
        call = getattr(torch._VF, "rnn_tanh" if op == "rnn" else op)
        return call(x, states, weights, True, 1, 0.0, True, False, False)

    def passes(layer: Callable[..., Any], wide: bool = False) -> Call:
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in inputs]

        def call() -> Any:
            with torch.enable_grad():
                y = layer(leaves[0], None, leaves[1:])[0]
            return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))

        return call

    return Problem(op, dtype, sizes, passes(getattr(FF, op)), passes(torchs), passes(torchs, True))


PROBLEMS: dict[str, Callable[[torch.dtype, tuple[int, ...], str], Problem]] = {
    "linear": _linear,
    "conv": functools.partial(_conv, True),
    "conv_nchw": functools.partial(_conv, False),
    "layer_norm": functools.partial(_norm, "layer_norm", 2),
    "layer_norm_backward": functools.partial(_norm_backward, "layer_norm", 2),
    "rms_norm": functools.partial(_norm, "rms_norm", 1),
    "rms_norm_backward": functools.partial(_norm_backward, "rms_norm", 1),
    "softmax": functools.partial(_norm, "softmax", 0),
    "softmax_backward": functools.partial(_norm_backward, "softmax", 0),
    "lstm": functools.partial(_recurrent, "lstm"),
    "gru": functools.partial(_recurrent, "gru"),
    "rnn": functools.partial(_recurrent, "rnn"),
    "attention": _attention,
    "attention_dq": functools.partial(_attention_backward, "attention_dq", slice(0, 1)),
    "attention_dkdv": functools.partial(_attention_backward, "attention_dkdv", slice(1, 3)),
}

# What one name stands for where an op has several kernels to tune.
PASSES = {
    "conv": ("conv", "conv_nchw"),
    "attention": ("attention", "attention_dq", "attention_dkdv"),
}

# What is tuned if no shapes are given: projections of transformers, also of few rows, widths of
# norms, and heads.
_PROJECTIONS = ((4096, 1024), (1024, 4096), (8192, 8192))
_WIDTHS: list[tuple[int, ...]] = [(n,) for n in (256, 1024, 2048, 4096, 8192, 16384)]
# Positions, channels out and in, taps: of residual networks and of diffusion.
_LAYERS: list[tuple[int, ...]] = [
    (1 << 18, 64, 64, 9), (1 << 16, 128, 128, 9), (1 << 14, 256, 256, 9), (1 << 15, 320, 320, 9),
]  # fmt: skip
# steps, rows, units
_SEQUENCES: list[tuple[int, ...]] = [
    *((256, B, H) for B in (16, 64, 256) for H in (128, 256, 512, 1024)),
    *((1024, B, 128) for B in (1, 16, 64)),
]
DEFAULTS: dict[str, list[tuple[int, ...]]] = {
    "linear": [(m, *sizes) for m in (16, 8192) for sizes in _PROJECTIONS],
    "conv": _LAYERS,
    "conv_nchw": _LAYERS,
    "layer_norm": _WIDTHS,
    "layer_norm_backward": _WIDTHS,
    "rms_norm": _WIDTHS,
    "rms_norm_backward": _WIDTHS,
    "softmax": _WIDTHS,
    "softmax_backward": _WIDTHS,
    "lstm": _SEQUENCES,
    "gru": _SEQUENCES,
    "rnn": _SEQUENCES,
    "attention": [(1, 128), (4, 128), (8, 128), (MANY, 64), (MANY, 128)],
    "attention_dq": [(MANY, 64), (MANY, 128)],
    "attention_dkdv": [(MANY, 64), (MANY, 128)],
}
