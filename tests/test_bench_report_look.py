"""Pictures of what was measured, and the page in a browser."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter

import pytest
from bench.report import marks, pictures, read, results, svg
from bench.report.page import page

import fake_results
from html_reader import Tables

DRAWN = ("Against torch's fastest call", "Against torch.compile", "Roofline", "What moves bytes")


@pytest.fixture(scope="module")
def html(fake):
    return page(read.machines(fake), marks.of, fake)


@pytest.fixture(scope="module")
def shown(html):
    return Tables(html)


def every(machine):
    for compiled in (False, True):
        yield pictures.speed(machine, "a", compiled)
        yield pictures.memory(machine, "a", compiled)
    yield pictures.roofline(machine, "a")
    yield pictures.traffic(machine, "a")
    for number, curve in enumerate(pictures.curves(machine.timed)):
        yield pictures.over_size(curve, "a", number)


def test_pictures_have_a_dot_a_case_and_only_the_pages_colours(fake):
    machine = read.machines(fake)[0]
    parts = [(one, part) for one in machine.timed for part in one.passes.values()]
    compiled = [one for one, part in parts if "compile" in part.way.over]
    found = list(every(machine))
    assert len(found) > 6
    told = {picture.name: ET.fromstring(picture.file()).iter() for picture in found}
    titles = {
        name: [node.text for node in nodes if node.tag.endswith("title")]
        for name, nodes in told.items()
    }
    assert sum(", quartiles " in text for text in titles["a-speed"]) == len(parts)
    assert sum(", quartiles " in text for text in titles["a-compile"]) == len(compiled)
    roofs = titles["a-roofline"] + titles["a-traffic"]
    assert all("TFLOP/s" in text or "TB/s" in text for text in roofs)
    assert len(titles["a-roofline"]) == sum(one.flops > 0 for one in machine.timed)
    for picture in found:
        for text, kind in ((picture.inline(), "css"), (picture.file(), "file")):
            assert "#00000" not in text, "a colour that stands for another"
            assert getattr(svg.INK, kind) in text
            assert ("<text" in text and "font-family" in text) or "font:" in text
        assert "<metadata" not in picture.inline() and "width=" not in picture.inline()[:200]


def test_references_in_pictures_lead_somewhere(shown, html):
    ids = Counter(attributes["id"] for _, attributes in shown.tags if "id" in attributes)
    assert max(ids.values()) == 1
    used = set(re.findall(r'url\(#([^)]+)\)|(?:xlink:)?href="#([^"]+)"', html))
    assert used and {a or b for a, b in used} <= ids.keys()


def test_a_picture_is_the_same_twice(fake):
    machine = read.machines(fake)[0]
    first, second = (pictures.roofline(machine, "a") for _ in range(2))
    assert first.inline() == second.inline()


def test_slower_is_red_and_more_memory_too():
    def bar(value, less):
        ratio = results.Ratio(value, value, value)
        return pictures.bars("x", [pictures.Dot("op", "both", ratio, "")], "", less).inline()

    red = svg.WORSE.css
    assert [red in bar(*case) for case in ((2, False), (0.5, False), (2, True), (0.5, True))] == [
        False, True, True, False,
    ]  # fmt: skip


def test_curves_are_along_the_dimension_that_differs(fake):
    machine = read.machines(fake)[0]
    found = {(curve.what, curve.part): curve.points for curve in pictures.curves(machine.timed)}
    widths = [size for size, _ in found["layer_norm", "forward"]]
    assert widths == [256, 1024, 4096, 16384, 65536]
    assert ("layer_norm backward", "both") not in found  # two sizes are no curve


def test_a_curve_for_each_last_dimension():
    def case(rows, heads):
        part = results.Pass("forward", "graph", 1, {}, {}, {}, {})
        return results.Timed(
            "attention", f"{rows}x{heads}", "fake", "bfloat16", [f"bfloat16[{rows}, {heads}]"], [],
            1, 1, {}, 1, 1, {}, {}, {"forward": part},
        )  # fmt: skip

    timed = [case(rows, heads) for heads in (64, 128) for rows in (16, 4, 8)]
    found = list(pictures.curves(timed))
    assert [curve.what for curve in found] == ["attention of 64", "attention of 128"]
    assert [[size for size, _ in curve.points] for curve in found] == [[4, 8, 16]] * 2


# in a browser

NAMES = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

# What a reader would find: widths with all folds open, pictures that take room, requests.
ASK = """<script>
for (const fold of document.querySelectorAll('details')) fold.open = true;
const all = selector => [...document.querySelectorAll(selector)];
const high = (selector, least) =>
  all(selector).filter(x => x.getBoundingClientRect().height > least).length;
parent.postMessage(JSON.stringify({
  width: innerWidth, page: document.documentElement.scrollWidth,
  requests: performance.getEntriesByType('resource').length,
  pictures: high('figure svg', 100), texts: high('figure svg text', 4), tables: high('table', 20),
  captions: all('figcaption').map(x => x.textContent),
  dots: all('figure svg title').length,
  sections: all('section h2').map(x => x.textContent) }), '*');
</script></body>"""

# A window cannot be as narrow as a phone, a frame can.
WIDTHS = 390, 1280
FRAMES = """<!doctype html><script>
const found = [];
onmessage = told => {
  found.push(told.data);
  document.body.dataset.found = JSON.stringify(found);
};
</script><body>"""
FRAME = '<iframe src="page.html" style="width:{}px;height:900px;border:0"></iframe>'


@pytest.mark.skipif(CHROMIUM is None, reason="neither Chromium nor Chrome is installed")
def test_in_a_browser(html, shown, tmp_path):
    (tmp_path / "page.html").write_text(html.replace("</body>", ASK), encoding="utf-8")
    frames = tmp_path / "frames.html"
    frames.write_text(FRAMES + "".join(map(FRAME.format, WIDTHS)))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path}/profile",
         "--virtual-time-budget=10000", frames.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    [body] = [attributes for tag, attributes in Tables(done.stdout).tags if tag == "body"]
    told = sorted(map(json.loads, json.loads(body["data-found"])), key=lambda one: one["width"])
    assert [one["width"] for one in told] == list(WIDTHS)
    for found in told:
        assert found["page"] <= found["width"], "the page scrolls sideways"
        assert found["requests"] == 0
        assert found["captions"][:4] == list(DRAWN)
        assert found["pictures"] == len(found["captions"]) == html.count("<figure>") > 6
        assert found["dots"] > 100 and found["texts"] > 50
        assert found["tables"] == len(shown.tables)
        assert found["sections"] == [fake_results.GPU, "Without a GPU"]
