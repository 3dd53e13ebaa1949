"""What fastdl's pages have in common: how they look, tables, and errors on a scale. No page needs
anything from elsewhere.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape

CSS = """
.fastdl { --back:#fbfbfa; --card:#fff; --ink:#1d2126; --dim:#69727d; --line:#e1e4e8;
  --done:#16794c; --kept:#9a6a00; --undone:#c0362c; --torch:#a9b1bb; --soft:#f0f2f4;
  background:var(--back); color:var(--ink); font:14px/1.45 system-ui,sans-serif; }
@media (prefers-color-scheme:dark) { .fastdl { --back:#14171a; --card:#1b1f23; --ink:#e3e7eb;
  --dim:#929ca7; --line:#30363d; --done:#4cc38a; --kept:#d6a13a; --undone:#f0695e;
  --torch:#5d6873; --soft:#24292e; } }
.fastdl * { box-sizing:border-box }
.fastdl main { max-width:76rem; margin:0 auto; padding:1.5rem }
.fastdl h1 { font-size:1.5rem; margin:0 } .fastdl h1 span { color:var(--dim); font-weight:400 }
.fastdl h2 { font-size:1.05rem; margin:2rem 0 .5rem }
.fastdl p { margin:.3rem 0 } .fastdl .dim { color:var(--dim) }
.fastdl .cards { display:flex; flex-wrap:wrap; gap:.6rem; margin:1rem 0 }
.fastdl .card { background:var(--card); border:1px solid var(--line); border-radius:8px;
  padding:.5rem .9rem; min-width:7rem; font:inherit; color:inherit; text-align:left }
.fastdl .card b { display:block; font-size:1.5rem; line-height:1.2 }
.fastdl .done { --is:var(--done) } .fastdl .kept { --is:var(--kept) }
.fastdl .undone { --is:var(--undone) }
.fastdl .mark { color:var(--is); font-weight:600 }
.fastdl .box { background:var(--card); border:1px solid var(--line); border-radius:8px;
  overflow:hidden; overflow-x:auto }
.fastdl table { border-collapse:collapse; width:100% }
.fastdl th { text-align:left; font-weight:600; color:var(--dim) }
.fastdl th,.fastdl td { padding:.3rem .75rem; border-top:1px solid var(--line);
  vertical-align:top }
.fastdl tr:first-child>* { border-top:0 }
.fastdl .num { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
.fastdl code,.fastdl .name { font:13px ui-monospace,monospace; overflow-wrap:anywhere }
.fastdl .whole { white-space:nowrap }
.fastdl .scale { display:block; position:relative; height:10px; margin:4px 0;
  background:var(--soft); border-radius:2px; min-width:6rem }
.fastdl .scale i { position:absolute; left:0; height:4px; top:0; background:var(--torch);
  border-radius:2px }
.fastdl .scale i+i { top:6px; background:var(--is,var(--done)) }
.fastdl .scale u { position:absolute; top:-2px; height:14px; width:2px; background:var(--ink) }
.fastdl .tall { max-height:32rem; overflow-y:auto }
@media (max-width:50rem) { .fastdl main { padding:.8rem } }
"""


def document(title: str, css: str, body: str, script: str = "") -> str:
    """A page of its own, from finished parts; the title is plain text."""
    script = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>body {{ margin:0 }}{css}</style></head>\n"
        f'<body class="fastdl"><main>{body}</main>{script}</body></html>\n'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """Rows of finished cells. A heading stands as its column does."""
    rows = list(rows)
    right = ['<td class="num"' in cell for cell in rows[0]]
    names = (
        f'<th class="num">{name}</th>' if flush else f"<th>{name}</th>"
        for name, flush in zip(head, right, strict=True)
    )
    lines = "".join(f"<tr>{''.join(cells)}</tr>" for cells in (names, *rows))
    return f'<div class="box {style}"><table>{lines}</table></div>'


def cell(text: str, number: bool = False, style: str = "") -> str:
    style = "num" if number else style
    return f'<td class="{style}">{escape(text)}</td>' if style else f"<td>{escape(text)}</td>"


def error_text(error: float) -> str:
    return f"{error:.1e}" if error else "0"


class Scale:
    """Where errors stand on a line from the smallest to the largest, in powers of ten."""

    def __init__(self, errors: Iterable[float | None]) -> None:
        exponents = [math.log10(e) for e in errors if e and math.isfinite(e)] or [0.0]
        self.low = math.floor(min(exponents)) - 0.5
        self.high = max(math.ceil(max(exponents)), self.low + 1)

    def at(self, error: float | None) -> str:
        if not error:
            return "0%"
        part = (math.log10(error) - self.low) / (self.high - self.low) if error < math.inf else 1
        return f"{100 * min(max(part, 0), 1):.0f}%"

    def bars(self, before: float, after: float, allowed: float | None) -> str:
        """Torch's above, fastdl's below; the tick is what is allowed."""
        told = f"torch {before:.1e}, fastdl {after:.1e}"
        told += f", allowed {allowed:.1e}" if allowed else ""
        tick = f'<u style="left:{self.at(allowed)}"></u>' if allowed else ""
        return (
            f'<span class="scale" title="{told}"><i style="width:{self.at(before)}"></i>'
            f'<i style="width:{self.at(after)}"></i>{tick}</span>'
        )
