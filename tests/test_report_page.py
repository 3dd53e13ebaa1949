"""The page of a plan or a report: what it says, that it is whole, and what was measured for it."""

import copy
import gc
import json
import re
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fastdl
from fastdl.optimize.report import Report, alike
from fastdl.optimize.speed import Gpu, measure
from fastdl.optimize.tree import tree_of
from fastdl.optimize.verify import Comparison, Proof
from html_reader import Whole


class Reader(Whole):
    """Collects lines of the tree by their path."""

    def __init__(self, text):
        self.lines, self.seen, self.folds = {}, {}, []
        self.path, self.depth = None, 0
        super().__init__(text)

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        attributes = dict(attributes)
        if tag == "details":
            self.folds.append("open" in attributes)
        if "row" in attributes.get("class", "").split() and "data-path" in attributes:
            self.path, self.depth = attributes["data-path"], len(self.open)
            assert self.path not in self.lines
            self.lines[self.path] = f"[{attributes['class']}] "
            # a fold shows its own line
            self.seen[self.path] = all(self.folds[:-1] if tag == "summary" else self.folds)

    def handle_endtag(self, tag):
        super().handle_endtag(tag)
        if tag == "details":
            self.folds.pop()
        if len(self.open) < self.depth:
            self.path, self.depth = None, 0

    def handle_data(self, data):
        if self.path is not None:
            self.lines[self.path] += data


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), nn.PReLU()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.mlp(self.act(self.norm(x)))


def layers(count=3, width=8):
    return nn.Sequential(*(Block(width) for _ in range(count)))


def lines(story):
    return Reader(story.to_html()).lines


# the tree


def test_repeated_layers_are_one_line():
    found = lines(fastdl.plan(layers(3)))
    assert list(found) == [
        "(the model)", "*", "*.norm", "*.act", "*.mlp", "*.mlp.0", "*.mlp.1", "*.mlp.2",
    ]  # fmt: skip
    assert "0 … 2" in found["*"] and "3 alike" in found["*"]
    assert "9 to replace" in found["(the model)"] and "3 left alone" in found["(the model)"]
    assert "3 to replace" in found["*"] and "1 left alone" in found["*"]
    assert found["*.norm"].startswith("[row done] norm LayerNormto replace layer_norm")
    assert found["*.act"].startswith("[row kept]")
    assert "fastdl has no rule for this class" in found["*.act"]
    assert "Linear + GELU as linear" in found["*.mlp.0"]
    assert found["*.mlp.1"].startswith("[row done]") and "in one op with 0" in found["*.mlp.1"]
    assert "modules" not in found["*.mlp.2"] and "72" in found["*.mlp.2"]


def _other_width(model):
    model[1].norm = nn.LayerNorm(8, elementwise_affine=False)


def _other_class(model):
    model[1].act = nn.SiLU()


def _parametrized(model):
    parametrizations.weight_norm(model[1].mlp[2])


def _other_reason(model):
    for block in model:
        block.norm.forward = nn.LayerNorm(8).forward
    del model[1].norm.forward
    model[1].norm.kept = torch.ones(1)


def _other_name(model):
    model[1].extra = nn.Identity()


@pytest.mark.parametrize(
    "change", [_other_width, _other_class, _parametrized, _other_reason, _other_name]
)
def test_layers_that_differ_are_not(change):
    model = layers(3)
    change(model)
    assert {"0", "1", "2"} <= lines(fastdl.plan(model)).keys()


def test_sites_that_differ_in_numbers_only_are_alike():
    blocks = [
        nn.Sequential(layer) for layer in (nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Linear(2, 2))
    ]
    plan = fastdl.plan(nn.ModuleDict({"a": nn.ModuleList(blocks), "a1": nn.Sequential(nn.ReLU())}))
    counts = [(site.name, site.pattern, len(same)) for site, same in alike(plan).items()]
    assert counts == [("a.*.0", "Linear", 2), ("a.1.0", "Conv2d", 1), ("a1.0", "ReLU", 1)]


def test_children_with_names_are_not_folded():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    assert {"q", "k"} <= lines(fastdl.plan(model)).keys()


def test_a_folded_line_has_the_largest_error():
    with fastdl.policy("definition"):
        report = fastdl.report(fastdl.optimize(layers(3), torch.randn(2, 8)))
    norms = [site for site in report.replaced if site.name.endswith("norm")]
    largest = max(norms, key=lambda site: site.after)
    line = lines(report)["*.norm"]
    assert f"{largest.before:.1e} → {largest.after:.1e}" in line
    summary = next(site for site in alike(report.replaced) if site.name == "*.norm")
    assert summary[3:] == largest[3:]


def test_shared_modules_stand_where_they_were_met_first():
    shared = layers(2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    found = lines(fastdl.plan(model))
    assert "shared with a" in found["b"] and "a.*.norm" in found and "b.*.norm" not in found
    count = sum(1 for _ in model.modules())
    assert f"<b>{count}</b>modules" in fastdl.plan(model).to_html()
    model["again"] = model  # a loop ends
    assert "shared with (the model)" in lines(fastdl.plan(model))["again"]


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.LazyLinear(4), nn.Identity])
def test_a_layer_alone(make):
    assert "(the model)" in lines(fastdl.plan(make()))["(the model)"]


def test_a_model_without_memory():
    with torch.device("meta"):
        model = nn.Linear(1 << 20, 1 << 20)
    page = fastdl.plan(model).to_html()
    assert "1,099,512,676,352 parameters · float32 · on meta" in page


class Side(nn.Module):
    """Calls each of its blocks on ones of its width."""

    def __init__(self, widths):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for width in widths])

    def forward(self, x):
        return sum(block(x[:, : block.norm.weight.numel()]).sum() for block in self.blocks)


def test_what_was_rolled_back_is_open_with_its_errors(monkeypatch):
    forward = fastdl.nn.LayerNorm.forward

    def wrong_for_nine(module, x):
        return forward(module, x) * (1.001 if x.shape[-1] == 9 else 1)

    monkeypatch.setattr(fastdl.nn.LayerNorm, "forward", wrong_for_nine)
    monkeypatch.setattr("fastdl.optimize._page.OPEN_LINES", 9)
    model = Side(range(8, 12))
    with fastdl.policy("definition"):
        report = fastdl.report(fastdl.optimize(model, torch.randn(2, 12)))
    (site,) = report.rolled_back
    text = report.to_html()
    found = Reader(text)
    line = found.lines["blocks.1.norm"]
    assert line.startswith("[row undone]") and "rolled back" in line
    assert "output: the error is too large" in line
    assert f"{site.before:.1e} → {site.after:.1e}".replace("0.0e+00", "0") in line
    assert f"allowed {site.allowed:.1e}" in text and site.after > 5e-4 > site.allowed > site.before
    assert found.seen["blocks.1.norm"] and not found.seen["blocks.2.norm"]
    assert "1 rolled back" in found.lines["blocks"] and "<b>1</b>rolled back" in text


# the rest of the page


def test_reasons_are_gathered():
    text = fastdl.plan(layers(3)).to_html()
    reasons = text[text.index("What stays, and why") :]
    assert reasons.count("fastdl has no rule for this class") == 1
    assert '<td class="num">3</td><td class="name">*.act</td>' in reasons
    assert "What stays" not in fastdl.plan(nn.Linear(4, 4)).to_html()


def _proof(count, failing):
    good, bad = Comparison(1e-7, 1e-7, 1e-5, 2.0), Comparison(1e-7, 1e-2, 1e-5, 2.0, "too large")
    gradients = {f"w{i}": good for i in range(count)} | {f"x{i}": bad for i in range(failing)}
    return Proof({"output": good}, gradients | {"none": Comparison(0, 0, 0, 1, "it is missing")})


@pytest.mark.parametrize(("count", "failing", "more"), [(9, 2, 0), (300, 3, 205), (300, 200, 301)])
def test_every_tensor_that_fails_is_shown(count, failing, more):
    text = Report(tree_of(nn.Linear(2, 2)), proof=_proof(count, failing)).to_html()
    Reader(text)
    assert text.count("gradient of x") == failing and "it is missing" in text
    assert (f"and {more:,} more" in text) == bool(more) and ("more that" in text) == bool(more)
    assert f"✗ {failing + 1} of {count + failing + 2} differ" in text
    # relative to the scale: what a failing tensor has, and what it may have
    assert '<td class="num">5.0e-03</td><td class="num">5.0e-06</td>' in text


def test_bars_are_on_a_log_scale():
    sites = [
        fastdl.plan(nn.Linear(2, 2))[0]._replace(
            name=str(i), before=1e-8, after=after, allowed=1e-4
        )
        for i, after in enumerate([0.0, 1e-7, 1e-6, 1e-5, float("inf")])
    ]
    tree = tree_of(nn.Sequential(*(nn.Linear(i + 1, 2) for i in range(5))))
    text = Report(tree, replaced=sites).to_html()
    widths = re.findall(
        r'width:(\d+)%"></i><i style="width:(\d+)%"></i><u style="left:(\d+)%', text
    )
    before, after, allowed = (list(map(int, column)) for column in zip(*widths, strict=True))
    assert len(set(before)) == len(set(allowed)) == 1
    assert after[0] == 0 and after[-1] == 100 and before[0] < after[1] and after[3] < allowed[0]
    assert after[2] - after[1] == pytest.approx(after[3] - after[2], abs=1)


def test_whatever_a_model_is_called_is_text():
    evil = "<script>alert(1)</script>"
    model = nn.ModuleDict({evil: type(evil, (nn.Linear,), {})(2, 2), 'a"b': nn.Linear(2, 2)})
    model.__class__ = type(evil, (nn.ModuleDict,), {})
    for text in (fastdl.plan(model).to_html(), fastdl.plan(model)._repr_html_()):
        assert "<script>alert" not in text and text.count("&lt;script&gt;alert(1)") >= 3
        found = Reader(text)
        assert 'a"b' in found.lines and sum(tag == "script" for tag, _ in found.tags) <= 1


def test_a_page_needs_nothing_else():
    text = fastdl.plan(layers()).to_html()
    assert text.startswith("<!doctype html>")
    assert not re.search(r"https?:|//\w|@import|url\(|\bsrc=|\bhref=", text)
    assert "prefers-color-scheme:dark" in text


def test_a_notebook_shows_a_part_that_styles_nothing_around_it():
    plan = fastdl.plan(layers())
    text = plan._repr_html_()
    assert Reader(text).lines.keys() == lines(plan).keys()
    assert "<script" not in text and "<body" not in text and "<input" not in text
    rules = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    selectors = re.findall(r"([^{}]*){", re.sub(r"@\w+ [^{]* {", "", rules))
    assert len(selectors) > 30
    for selector in selectors:
        assert all(part.strip().startswith(".fastdl") for part in selector.split(","))


def test_a_page_of_many_modules_is_small():
    model = nn.ModuleList([Block(width) for width in range(2, 169)])
    assert sum(1 for _ in model.modules()) > 1000
    text = fastdl.plan(model).to_html()
    assert len(Reader(text).lines) > 1000 and len(text) < 1 << 20


def test_a_page_does_not_keep_the_model_alive():
    model = layers()
    plan, report, gone = fastdl.plan(model), fastdl.report(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert "3 alike" in plan.to_html() and "3 alike" in report.to_html()


# time and memory


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr("fastdl.optimize.speed.WARM", 1)
    monkeypatch.setattr("fastdl.optimize.speed.ROUNDS", 3)


class Clock:
    """Stands for a GPU: calls take as many milliseconds as it is told, in turn."""

    name = "a clock"

    def __init__(self, *milliseconds):
        self.milliseconds, self.calls = milliseconds, []

    def seconds(self, call):
        call()
        self.calls.append(call)
        return 1e-3 * self.milliseconds[len(self.calls) % 2]

    def peak_bytes(self, call):
        call()
        return 1 << 20


def test_models_are_measured_in_turn(few_rounds):
    before, after, x = layers(1), fastdl.optimize(layers(1)), torch.randn(2, 8)
    clock, state = Clock(2.0, 3.0), torch.get_rng_state()
    with fastdl.policy("definition"):
        speed = measure(before, after, (x,), {}, clock)
    for one, two, *rest in (clock.calls[:6], clock.calls[6:]):
        assert one is not two and rest == [one, two] * 2
    assert list(speed.passes) == ["forward", "forward and backward"]
    found = speed.passes["forward"]
    assert (found.ms_before, found.ms_after) == pytest.approx((3.0, 2.0))
    assert speed.cells("forward") == ("3.00 ms", "2.00 ms", "1.50x", "1.0 MB", "1.0 MB")
    assert torch.equal(torch.get_rng_state(), state)

    report = Report(tree_of(after), speed=speed)
    text = report.to_html()
    Reader(text)
    assert "Time and memory on a clock" in text and '<td class="num">1.50x</td>' in text
    assert "1.50x" in str(report) and json.loads(report.to_json())["speed"]["device"] == "a clock"


def test_a_frozen_model_has_no_backward(few_rounds):
    model = nn.Linear(4, 4).requires_grad_(False)
    assert list(measure(model, model, (torch.randn(2, 4),), {}, Clock(1, 1)).passes) == ["forward"]


def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = fastdl.optimize(layers(1))
    assert fastdl.report(model).speed is None
    assert "memory" not in fastdl.report(model).to_html()
    report = fastdl.report(model, torch.randn(2, 8))
    assert "not measured: there is no GPU" in report.to_html()
    assert str(report).endswith("not measured: there is no GPU")
    assert all(parameter.grad is None for parameter in model.parameters())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "the model is on cpu" in str(fastdl.report(model, torch.randn(2, 8)))


def test_measuring_leaves_no_trace(few_rounds, monkeypatch):
    monkeypatch.setattr("fastdl.optimize.speed._why_not", lambda model: "")
    monkeypatch.setattr("fastdl.optimize.speed.Gpu", lambda: Clock(1, 1))
    model = fastdl.optimize(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()))
    kept, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    forms = []
    handle = model[0].register_forward_hook(lambda layer, *_: forms.append(type(layer)))
    with fastdl.policy("definition"):
        speed = fastdl.report(model, torch.randn(4, 8)).speed
    handle.remove()
    assert len(speed.passes) == 2 and set(forms) == {nn.Linear, fastdl.nn.Linear}
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.gpu
def test_measured_on_a_gpu():
    model, x = layers(2, 256).cuda(), torch.randn(512, 256, device="cuda")
    kept = copy.deepcopy(model.state_dict())
    report = fastdl.report(fastdl.optimize(model, x), x)
    assert report.speed.device == Gpu().name
    forward, both = report.speed.passes.values()
    assert 0 < forward.ms_after < both.ms_after and 0 < forward.ms_before < both.ms_before
    assert 0 < forward.bytes_after < both.bytes_after
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
