"""What all tests share: the device, fresh state, poisoned memory, and seconds by file."""

import os
import shutil
import sys
from collections import defaultdict

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cpu", "cuda"), help="where tests run; default: a GPU if there is one"
    )


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # the workers share the cores
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU")
    if _device(config) == "cpu":
        # Read when a kernel is decorated, so it has to stand before any test module is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _device(config):
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(config, items):
    if _device(config) == "cuda":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter):
    seconds = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if seconds:
        terminalreporter.section("seconds by file")
    for path, total in sorted(seconds.items(), key=lambda entry: -entry[1]):
        terminalreporter.write_line(f"{total:8.1f}  {path}")


@pytest.fixture(scope="session")
def device(pytestconfig):
    return _device(pytestconfig)


@pytest.fixture(autouse=True)
def _fresh_state():
    torch.manual_seed(0)
    yield
    # Not imported here: most tests do not need it, and it is slow to import.
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture
def fused():
    """The fused form or an error: no test passes by falling back."""
    import fastdl

    with fastdl.policy("fused", on_fallback="error"):
        yield


@pytest.fixture(params=["fused", "definition"])
def form(request):
    """The kernels or an error; and plain torch."""
    import fastdl

    options = {"on_fallback": "error"} if request.param == "fused" else {}
    with fastdl.policy(request.param, **options):
        yield


@pytest.fixture
def poisoned():
    """NaN in every new torch.empty, so that an element nobody wrote shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    # warn_only, because the filling is wanted here, not the errors
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]


@pytest.fixture(scope="session")
def fake(tmp_path_factory):
    """A folder of results: fake ones of a GPU, and the real ones that need none."""
    from bench.report.static import FOLDER
    from bench.store import RESULTS

    import fake_results

    results = tmp_path_factory.mktemp("results")
    fake_results.write(results, ops=("linear", "layer_norm", "adamw"))
    shutil.copytree(RESULTS / FOLDER, results / FOLDER)
    return results
