"""What the demonstration trains: a small classifier of two spirals, and the picture of it."""

import copy
import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._table import Progress
from .ops import _launch
from .ops._route import policy
from .optimize.plan import optimize

STEPS, BATCH, RATE, POINTS, TURNS = 48, 64, 2e-2, 400, 1.25

BARS = "▁▂▃▄▅▆▇█"
TORCH_STYLE = {"color": "#f4a261", "linewidth": 5, "label": "torch"}
FUSED_STYLE = {"color": "#1d3557", "linewidth": 1.5, "label": "fastdl"}


class Waves(nn.Module):
    """Sines and cosines of learned projections: a class of the user's own, with no rule."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(2, dim // 2))

    def forward(self, x: Tensor) -> Tensor:
        phase = x @ self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class Block(nn.Module):
    """What a transformer does between its attentions."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Classifier(nn.Module):
    """Says to which of two spirals a point of the plane belongs."""

    def __init__(self, dim: int = 16, hidden: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        self.waves = Waves(dim)
        self.block = Block(dim, hidden, dropout)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.waves(x))))


class Curves(NamedTuple):
    """The losses of three runs that begin alike, and the two models trained in float32."""

    torch: list[float]
    fused: list[float]
    judge: list[float]
    models: tuple[nn.Module, nn.Module]

    def distances(self, losses: Sequence[float]) -> list[float]:
        """How far a run is from the one in float64, at each step."""
        return [abs(loss - true) for loss, true in zip(losses, self.judge, strict=True)]


def spirals(count: int, device: str) -> tuple[Tensor, Tensor]:
    """Points on two spirals, a little blurred, and which of the two each one is on."""
    generator = torch.Generator().manual_seed(0)
    radius = 0.1 + 0.9 * torch.rand(count, generator=generator).sqrt()
    labels = torch.arange(count) % 2
    angle = radius * TURNS * 2 * math.pi + labels * math.pi
    points = 2 * torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    points += 0.04 * torch.randn(count, 2, generator=generator)
    return points.to(device), labels.to(device)


def output(model: nn.Module, points: Tensor) -> Tensor:
    was = model.training
    with torch.no_grad():
        output = model.eval()(points)
    model.train(was)
    return output


def compare_training(points: Tensor, labels: Tensor, steps: int) -> Curves:
    """The same training three times: in torch, with fastdl's kernels, and in float64."""
    torch.manual_seed(0)
    plain = Classifier(dropout=0.0).to(points.device)
    fused, judge = optimize(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    with Progress("training") as progress:
        losses = train(plain, points, labels, steps)
        true = train(judge, points.double(), labels, steps)
        # "error": a fallback to torch would end the demonstration, not embellish it
        with policy("fused", "error") if _launch.HAVE_TRITON else policy():
            ours = train(fused, points, labels, steps, progress)
    return Curves(losses, ours, true, (plain, fused))


def train(
    model: nn.Module,
    points: Tensor,
    labels: Tensor,
    steps: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(steps):
        progress(step, steps)
        chosen = torch.randperm(len(points), generator=generator)[:BATCH].to(points.device)
        loss = F.cross_entropy(model(points[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sparkline(values: Sequence[float]) -> str:
    """A curve in one line of text."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / ((high - low) or 1)
    return "".join(BARS[round((value - low) * scale)] for value in values)


def draw(curves: Curves, points: Tensor, labels: Tensor, path: Path) -> bool:
    """Losses, their distance from float64, and what was learned. False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained", dpi=120)
    losses, distances, plane = figure.subplots(1, 3)
    _draw_losses(losses, curves)
    _draw_distances(distances, curves)
    _draw_plane(plane, curves.models[1], points, labels)
    for axes in (losses, distances):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path)
    return True


def _draw_losses(axes: Any, curves: Curves) -> None:
    axes.plot(curves.torch, **TORCH_STYLE)
    axes.plot(curves.fused, **FUSED_STYLE)
    axes.set_title("Loss: one curve lies on the other")


def _draw_distances(axes: Any, curves: Curves) -> None:
    for losses, style in ((curves.torch, TORCH_STYLE), (curves.fused, FUSED_STYLE)):
        axes.plot(list(itertools.accumulate(curves.distances(losses), max)), **style)
    axes.set_title("Largest distance so far from training in float64")


def _draw_plane(axes: Any, model: nn.Module, points: Tensor, labels: Tensor) -> None:
    """The answer for each spot of the plane, computed in torch: it is many points."""
    line = torch.linspace(-2.4, 2.4, 160, device=points.device)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    with policy("definition"):
        sure = output(model, grid.view(-1, 2)).softmax(-1)[:, 1].view(len(line), -1)
    edges = (-2.4, 2.4, -2.4, 2.4)
    # pale, so that the points stand out
    pale = {"cmap": "RdBu", "vmin": -0.7, "vmax": 1.7}
    axes.imshow(sure.cpu().numpy(), origin="lower", extent=edges, **pale)
    x, y = points.T.cpu().numpy()
    axes.scatter(x, y, c=labels.cpu().numpy(), cmap="RdBu", s=9, edgecolors="white", linewidths=0.4)
    axes.set_title("What the model trained by fastdl says")
    axes.set_xticks([])
    axes.set_yticks([])
