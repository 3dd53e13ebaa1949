"""Pictures by matplotlib, made fit to stand in a page: text is text, colours are the page's own."""

import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Colour(NamedTuple):
    """What matplotlib draws with, what it becomes in a page, and in a file on white or black."""

    drawn: str
    css: str
    file: str


INK = Colour("#000001", "currentColor", "#808890")
GRID = Colour("#000002", "var(--line)", "#80889055")
OURS = Colour("#000003", "var(--done)", "#2a9d6a")
TORCH = Colour("#000004", "var(--torch)", "#909aa5")
COMPILE = Colour("#000005", "var(--kept)", "#c08a20")
WORSE = Colour("#000006", "var(--undone)", "#d9564a")
BLUE = Colour("#000007", "var(--blue)", "#4a86d0")
VIOLET = Colour("#000008", "var(--violet)", "#9a6fd0")
ROSE = Colour("#000009", "var(--rose)", "#c75f9b")
COLOURS = (INK, GRID, OURS, TORCH, COMPILE, WORSE, BLUE, VIOLET, ROSE)

# The page's colours beyond those that all pages have.
CSS = """
.fastdl { --blue:#2563b0; --violet:#7a4cb8; --rose:#b03a7c }
@media (prefers-color-scheme:dark) { .fastdl { --blue:#6aa5ea; --violet:#b08ae6; --rose:#e285b8 } }
"""

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may have a $ in it
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID.drawn,
    "grid.linewidth": 0.7,
    "axes.edgecolor": GRID.drawn,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **{f"{name}.color": INK.drawn for name in ("text", "xtick", "ytick")},
    **{f"axes.{name}color": INK.drawn for name in ("label", "title")},
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


# What may stand in no XML.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def label(name: str) -> str:
    """A name that leaves room for the picture."""
    return name if len(name) <= 28 else f"{name[:27]}…"


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """What draws has the page's style."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, with one pair of axes."""
    from matplotlib.figure import Figure

    drawn = Figure((width, height), layout="constrained")
    return drawn, drawn.add_subplot()


class Tips:
    """What is told when one points at a part of a picture."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> str:
        """The id that matplotlib is to give to this part."""
        self.texts.append(CONTROL.sub("", text))
        return f"tip-{len(self.texts) - 1}"


class Picture(NamedTuple):
    """A finished picture, as matplotlib wrote it."""

    name: str
    about: str
    drawn: str
    tips: Sequence[str]

    def inline(self) -> str:
        """For a page: it takes its colours from there, and its ids are its own."""
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", self._told(self.drawn), count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        for colour in COLOURS:
            text = text.replace(colour.drawn, colour.css)
        return text

    def file(self) -> str:
        """For a README: colours that can be read on white and on black."""
        text = self._told(self.drawn)
        for colour in COLOURS:
            text = text.replace(colour.drawn, colour.file)
        return text

    def _told(self, text: str) -> str:
        """With titles, and without ids that nothing refers to."""
        used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))

        def renamed(match: re.Match[str]) -> str:
            id, end = match.groups()
            if id.startswith("tip-"):
                return f"{end}<title>{escape(self.tips[int(id[4:])])}</title>"
            return f' id="{self.name}-{id}"{end}' if id in used else end

        text = re.sub(r' id="([^"]+)"(>?)', renamed, text)
        text = re.sub(r'(url\(#|href="#)', rf"\g<1>{self.name}-", text)
        label = f'<svg role="img" aria-label="{escape(self.about)}"'
        return text.replace("<svg", label, 1)


def picture(drawn: Any, name: str, about: str, tips: Tips) -> Picture:
    """Write the figure. The same figure gives the same text."""
    import matplotlib

    written = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # text is text, so what matplotlib's own font lacks is no matter
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        drawn.savefig(written, format="svg", metadata=nothing)
    text = written.getvalue()
    text = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "system-ui, sans-serif", text)
    text = CONTROL.sub("", text[text.index("<svg") :])
    return Picture(name, CONTROL.sub("", about), text, tips.texts)
