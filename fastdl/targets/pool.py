"""Worker processes, a thread of this one for each. A compiler that crashes costs one request."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """A worker died over a request."""


class Pool:
    def __init__(self, size: int) -> None:
        self._threads = ThreadPoolExecutor(size)
        self._local = threading.local()
        self._workers: list[_Worker] = []

    def map(self, ask: Callable[["Pool", Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        return self._threads.map(lambda item: ask(self, item), items)

    def start(self, ask: Callable[["Pool", Any], Any], item: Any) -> "Future[Any]":
        return self._threads.submit(ask, self, item)

    def request(self, request: dict[str, Any]) -> Any:
        """Ask this thread's worker."""
        worker = getattr(self._local, "worker", None)
        if worker is None or worker.process.poll() is not None:
            worker = self._local.worker = _Worker()
            self._workers.append(worker)
        return worker.request(request)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


@contextmanager
def pool(size: int | None = None, most: int | None = None) -> Iterator[Pool]:
    """As many workers as processors, at `most` so many."""
    size = size or os.cpu_count() or 1
    made = Pool(min(size, most or size))
    try:
        yield made
    finally:
        made.close()


class _Worker:
    def __init__(self) -> None:
        package = __package__ or ""
        root = Path(__file__).parents[len(package.split("."))]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), env.get("PYTHONPATH")]))
        env["OMP_NUM_THREADS"] = "1"
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{package}.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True, env=env,
        )  # fmt: skip

    def request(self, request: dict[str, Any]) -> Any:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.stderr.seek(0)
        last = self.stderr.read().strip().rpartition("\n")[2]
        raise WorkerError(f"the compiler's process ended with status {status}: {last}")

    def close(self) -> None:
        """A worker ends when its input does."""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait()
        self.stderr.close()
