"""The demonstration from end to end: what it claims is there, and it ends well."""

import pytest

from fastdl.cli import main

CHAPTERS = (
    "A model in plain PyTorch",
    "fastdl.plan(model)",
    "fastdl.optimize(model, example_inputs)",
    "fastdl.verify",
    "a wrong gradient",
    "fastdl check",
    "Training",
    "Speed",
    "fastdl.restore(model)",
)


def demo(capsys, *options):
    assert main(["demo", *options]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    return said.out


@pytest.mark.slow
def test_demo(tmp_path, capsys, device):
    picture = tmp_path / "demo.png"
    printed = demo(capsys, "--steps", "3", "--picture", str(picture))
    places = [printed.index(chapter) for chapter in CHAPTERS]
    assert places == sorted(places)
    assert "Linear + GELU + Dropout" in printed
    assert "Waves" in printed
    assert "the models agree" in printed
    assert "the error is too large" in printed
    assert "bit by bit: yes" in printed
    assert "All of it agreed" in printed
    assert ("no time is measured" in printed) == (device == "cpu")
    assert ("faster by" in printed) == (device == "cuda")
    pytest.importorskip("matplotlib")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_demo_without_rich_and_matplotlib(tmp_path, capsys, monkeypatch):
    hidden = ("rich", "matplotlib")
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name in hidden else find(name, *a)
    )
    picture = tmp_path / "demo.png"
    assert "pip install matplotlib" in demo(capsys, "--steps", "1", "--picture", str(picture))
    assert not picture.exists()


@pytest.mark.slow
def test_a_wrong_result_is_told(capsys, monkeypatch, tmp_path):
    """What restore leaves behind makes the demonstration fail."""
    monkeypatch.setattr("fastdl._demo.restore", lambda model: model)
    assert main(["demo", "--steps", "1", "--picture", str(tmp_path / "demo.png")]) == 1
    printed = capsys.readouterr().out
    assert "every module has the class it had: NO" in printed
    assert "NOT ALL OF IT AGREED" in printed
