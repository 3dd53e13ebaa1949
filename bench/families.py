"""Models that people have, random and from their configurations alone: nothing is downloaded.

Each at two sizes: a small one for tests, and one that keeps a GPU busy for milliseconds.
"""

import importlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WIDTH, WORDS = 32, 64


class MissingLibrary(Exception):
    """A model's library is not installed. `name` is the library."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not installed")
        self.name = name


class Size(NamedTuple):
    """A model, and what it is called with: a tensor, or a dict of keywords."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]


class Family(NamedTuple):
    """A model at both sizes. Only some are timed."""

    small: Size
    large: Size | None = None


def of_transformers(kind: str, config: str) -> Callable[..., Callable[[], nn.Module]]:
    def make(**sizes: Any) -> nn.Module:
        transformers = _library("transformers")
        transformers.logging.set_verbosity_error()
        return getattr(transformers, kind)(getattr(transformers, config)(**sizes))

    return partial(partial, make)


def of_diffusers(kind: str) -> Callable[..., Callable[[], nn.Module]]:
    def make(**sizes: Any) -> nn.Module:
        return getattr(_library("diffusers"), kind)(**sizes)

    return partial(partial, make)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingLibrary(name) from None


def tokens(*shape: int, words: int = WORDS) -> Tensor:
    return torch.randint(3, words, shape)


def labelled(batch: int = 2, length: int = 9, words: int = WORDS) -> dict[str, Tensor]:
    ids = tokens(batch, length, words=words)
    return {"input_ids": ids, "labels": ids}


def of_text(*sizes: int) -> Callable[[], dict[str, Tensor]]:
    return partial(labelled, *sizes)


def images(*shape: int, layout: Any = torch.contiguous_format) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape).contiguous(memory_format=layout)


def classified(batch: int, side: int, classes: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "pixel_values": torch.randn(batch, 3, side, side),
        "labels": torch.arange(batch) % classes,
    }


def spoken(
    batch: int, bins: int, frames: int, length: int, words: int
) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "input_features": torch.randn(batch, bins, frames),
        "labels": tokens(batch, length, words=words),
    }


def captioned(batch: int, length: int, words: int, side: int) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "input_ids": tokens(batch, length, words=words),
        "pixel_values": torch.randn(batch, 3, side, side),
        "return_loss": True,
    }


def noisy(batch: int, side: int, length: int, width: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "sample": torch.randn(batch, 4, side, side),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(batch, length, width),
    }


def of_classes(batch: int, side: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "hidden_states": torch.randn(batch, 4, side, side),
        "timestep": torch.arange(3, batch + 3),
        "class_labels": torch.arange(1, batch + 1) % 10,
    }


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    def __init__(self, i: int, width: int, stride: int = 1) -> None:
        super().__init__()
        o = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(i, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2, self.bn3 = nn.BatchNorm2d(width), nn.BatchNorm2d(o)
        self.conv3, self.relu = nn.Conv2d(width, o, 1, bias=False), nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or i != o:
            conv = nn.Conv2d(i, o, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


def resnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        Residual(8, 8), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def resnet_50() -> nn.Sequential:
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    blocks: list[nn.Module] = []
    channels = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for number in range(depth):
            stride = 2 if number == 0 and width > 64 else 1
            blocks.append(Bottleneck(channels, width, stride))
            channels = 4 * width
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))
    model = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *tail)
    return model.to(memory_format=torch.channels_last)


class Words(nn.Module):
    """A language model on an LSTM."""

    def __init__(
        self, words: int = WORDS, width: int = 16, hidden: int = 24, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, hidden, 2, batch_first=True)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(hidden, words)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.drop(self.lstm(self.words(ids))[0]))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Decode(nn.Module):
    """One more token for a causal language model that has read `past` tokens."""

    def __init__(self, make: Callable[[], nn.Module], batch: int, past: int) -> None:
        super().__init__()
        self.model = model = make()
        config = model.config
        shape = (2, batch, config.num_key_value_heads, past, config.head_dim)
        for i in range(config.num_hidden_layers):
            self.register_buffer(f"past_{i}", torch.randn(shape))

    def forward(self, ids: Tensor) -> Tensor:
        from transformers import DynamicCache

        past = DynamicCache([tuple(buffer) for buffer in self.buffers(recurse=False)])
        return self.model(input_ids=ids, past_key_values=past).logits


def encoder(
    width: int = WIDTH, heads: int = 4, hidden: int = 48, layers: int = 2, dropout: float = 0.1
) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, heads, hidden, dropout, activation="gelu", batch_first=True
    )
    return nn.TransformerEncoder(layer, layers)


def autoencoder(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.GELU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.SiLU(),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.GELU(),
        nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip


def mlp(width: int = WIDTH, hidden: int = 48, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
        nn.Linear(hidden, classes),
    )  # fmt: skip
