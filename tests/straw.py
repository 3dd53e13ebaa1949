"""A GPU of straw: torch.cuda as far as timings use it, on which nothing runs."""

import contextlib
import types
from unittest import mock

import torch
from bench.machine import Gpu

from fastdl.contract import BenchCase

NAME, EVENT_MS = "Straw 1", 0.5


def small(op, make, backward=False, dtype=torch.bfloat16):
    return BenchCase(f"small {op}", make, 1000, 1000, dtype=dtype, backward=backward)


class Stream:
    def wait_stream(self, other):
        pass


class Event:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def elapsed_time(self, other):
        return EVENT_MS


class Straw:
    def __init__(self, l2=100):
        self.streams = [Stream()]
        self.capturing = False
        self.replays = self.synchronized = 0
        self.properties = types.SimpleNamespace(name=NAME, L2_cache_size=l2)

    def patches(self, **more):
        """What to put in place of torch.cuda's own."""
        replaced = {
            "Event": Event,
            "Stream": Stream,
            "stream": self.stream,
            "current_stream": lambda: self.streams[-1],
            "CUDAGraph": lambda: types.SimpleNamespace(replay=self.replay),
            "graph": self.graph,
            "synchronize": self.synchronize,
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 100,
            "max_memory_allocated": lambda: 400,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: self.properties,
            **more,
        }
        found = [mock.patch.object(torch.cuda, name, new) for name, new in replaced.items()]
        return [*found, mock.patch.object(Gpu, "device", "cpu")]

    @contextlib.contextmanager
    def installed(self):
        with contextlib.ExitStack() as stack:
            for patch in self.patches():
                stack.enter_context(patch)
            yield self

    @contextlib.contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    @contextlib.contextmanager
    def graph(self, graph, stream=None):
        self.capturing = True
        try:
            with self.stream(stream or Stream()):
                yield
        finally:
            self.capturing = False

    def replay(self):
        self.replays += 1

    def synchronize(self):
        self.synchronized += 1
