"""A plan or a report as a page: the model's tree, what became of each module, errors, the proof."""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import takewhile

from .._env import env
from ..page import CSS, Scale, cell, document, error_text, table
from ._folded import Line, folded
from ._style import CSS as OWN_CSS, JS
from .compiled import Compiled
from .report import Plan, Site, Story, alike
from .speed import Speed
from .tree import Node
from .verify import Proof

# What becomes of a site, as the page's style calls it; of several in a line, the last counts.
KINDS = {"to replace": "done", "replaced": "done", "left alone": "kept", "rolled back": "undone"}

# About as many lines of the tree are open at first; as many tensors of a proof, names of a reason.
OPEN_LINES, TENSORS, NAMES = 60, 100, 20

LEGEND = (
    "Bars: the largest error over a site's outputs and gradients against float64, relative to the "
    "tensor's largest value, on a log scale: torch's above, fastdl's below; the tick is what is "
    "allowed."
)

PROOF = "below: errors relative to the tensor's largest value, on a scale as above"


def page(story: Story) -> str:
    """A page of its own."""
    parts = (
        _head(story),
        _cards(story, "button"),
        _verdict(story),
        _speed(story.speed),
        _compiled(story.compiled),
        f"<h2>The model</h2>{FILTER}{_tree(story)}",
        _reasons(story),
        _proof(story.proof),
    )
    title = f"{story.tree.root.cls}: {_kind(story)} by fastdl"
    return document(title, CSS + OWN_CSS, "".join(parts), JS)


def compact(story: Story) -> str:
    """What a notebook shows: counts and the tree."""
    parts = (_head(story), _cards(story, "div"), _verdict(story), _tree(story))
    return f'<style>{CSS}{OWN_CSS}</style><div class="fastdl"><main>{"".join(parts)}</main></div>'


FILTER = (
    '<div class="bar"><input type="search" placeholder="filter: a name, a class, an op, a reason" '
    'aria-label="filter"><button data-open="all">open all</button>'
    '<button data-open="none">fold all</button></div>'
)


def _kind(story: Story) -> str:
    return type(story).__name__.lower()


def _head(story: Story) -> str:
    found, tree = env(), story.tree
    model = [f"{tree.root.parameters:,} parameters", *tree.dtypes]
    model += [f"on {device}" for device in tree.devices]
    here = [
        f"{name} {found.versions[name] or 'not here'}" for name in ("fastdl", "torch", "triton")
    ]
    here += [str(device["name"]) for device in found.devices] or ["no GPU"]
    here += ["kernels run in Triton's interpreter"] if found.interpreted else []
    return (
        f"<h1>{escape(tree.root.cls)} <span>{_kind(story)} by fastdl</span></h1>"
        f'<p class="dim">{escape(" · ".join(model))}</p>'
        f'<p class="dim">{escape(" · ".join(here))}</p>'
    )


def _cards(story: Story, tag: str) -> str:
    cards = [
        f'<{tag} class="card {KINDS[title]}" data-is="{KINDS[title]}" aria-pressed="false">'
        f"<b>{len(sites):,}</b>{title}</{tag}>"
        for title, sites in story.groups.items()
    ]
    cards.append(f'<div class="card"><b>{_modules(story.tree.root):,}</b>modules</div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _modules(node: Node) -> int:
    return (node.same_as is None) + sum(map(_modules, node.children))


def _verdict(story: Story) -> str:
    if isinstance(story, Plan):
        return ""
    if story.proof is None:
        return '<p class="dim">Not verified: that takes example inputs, or was turned off.</p>'
    kind, sign = ("done", "✓") if story.proof.ok else ("undone", "✗")
    first, *_ = str(story.proof).splitlines()
    return f'<p class="{kind}"><span class="mark">{sign} {escape(first)}</span></p>'


def _speed(speed: Speed | None) -> str:
    if speed is None:
        return ""
    if speed.reason:
        return f'<p class="dim">Time and memory: not measured: {escape(speed.reason)}.</p>'
    rows = [[cell(text, index > 0) for index, text in enumerate((name, *speed.cells(name)))]
            for name in speed.passes]  # fmt: skip
    return (
        f"<h2>Time and memory on {escape(speed.device)}</h2>"
        f"{table(('', 'before', 'after', 'faster by', 'memory before', 'memory after'), rows)}"
        '<p class="dim">Medians of calls in turn, before and after, launches included; memory at '
        "its peak on top of the model.</p>"
    )


def _compiled(compiled: Compiled | None) -> str:
    if compiled is None:
        return ""
    lines = "".join(f"<p>{escape(line)}</p>" for line in str(compiled).splitlines())
    return f"<h2>The graphs</h2>{lines}"


# errors


def _scale(sites: Iterable[Site]) -> Scale:
    return Scale(error for site in sites for error in (site.before, site.after, site.allowed))


# the tree


def _tree(story: Story) -> str:
    root = folded(story.tree.root, story.groups)
    scale = _scale(site for sites in story.groups.values() for site in sites)
    measured = any(site.after is not None for sites in story.groups.values() for site in sites)
    legend = f'<p class="dim">{LEGEND}</p>' if measured else ""
    drawn = _line(root, scale, _open_depth(root))
    empty = '<p class="empty" hidden>Nothing is called so.</p>'
    return f'<div class="box tree">{_columns(story, measured)}{drawn}{empty}</div>{legend}'


def _columns(story: Story, measured: bool) -> str:
    verb = "would become" if isinstance(story, Plan) else "became"
    errors = "torch's error → fastdl's" if measured else ""
    return (
        f'<div class="row head"><span>module</span><span class="op">what {verb} of it</span>'
        f'<span class="errors">{errors}</span><span class="count num">weights</span></div>'
    )


def _open_depth(root: Line) -> int:
    """How many levels are open, so that no more lines are seen at first than a page or two hold."""
    depth, seen, level = 0, 1, [root]
    while level:
        level = [line for above in level for line in above.lines]
        seen += len(level)
        if seen > OPEN_LINES and depth:
            break
        depth += 1
    return depth


def _line(line: Line, scale: Scale, depth: int) -> str:
    kinds = [KINDS[title] for title, _ in line.sites]
    if line.part_of:
        kinds.append(KINDS[line.part_of[0]])
    kind = next((kind for kind in ("undone", "kept", "done") if kind in kinds), "none")
    whole = line.path or "(the model)"
    cells = f"{_name(line)}{_op(line)}{_errors(line, scale)}"
    cells += f'<span class="count num dim">{_short(line.first.parameters)}</span>{_why(line)}'
    attributes = f'class="row {kind}" data-path="{escape(whole)}"'
    if not line.lines:
        return f"<div {attributes}>{cells}</div>"
    # what was rolled back is never hidden
    is_open = " open" if depth > 0 or line.below["rolled back"] else ""
    inside = "".join(_line(child, scale, depth - 1) for child in line.lines)
    return (
        f"<details{is_open}><summary {attributes}>{cells}</summary>"
        f'<div class="kids">{inside}</div></details>\n'
    )


def _name(line: Line) -> str:
    key = line.first.key or "(the model)"
    many = ""
    if line.times > 1:
        key = f"{key} … {line.last.key}" if line.times > 2 else f"{key}, {line.last.key}"
        many = f' <span class="times">{line.times} alike</span>'
    return f'<span class="name"><b>{escape(key)}</b> {escape(line.first.cls)}{many}</span>'


def _op(line: Line) -> str:
    words = []
    for title, site in line.sites:
        pattern = f" {escape(site.pattern)} as" if " + " in site.pattern else ""
        route = f' <span class="dim">· {escape(site.route)}</span>' if site.route else ""
        source = f'<br><code class="dim">{escape(site.source)}</code>' if site.source else ""
        words.append(f'<span class="mark">{title}</span>{pattern} {escape(site.op)}{route}{source}')
    if line.part_of:
        words.append(escape(line.part_of[1]))
    if line.first.same_as is not None:
        words.append(f"shared with {escape(line.first.same_as or '(the model)')}")
    if line.below:
        counts = [
            f'<span class="times mark {KINDS[title]}">{line.below[title]:,} {title}</span>'
            for title in KINDS
            if line.below[title]
        ]
        words.append(" ".join(counts))
    return f'<span class="op">{"<br>".join(words)}</span>'


def _errors(line: Line, scale: Scale) -> str:
    for _, site in line.sites:
        if site.before is not None and site.after is not None:
            bars = scale.bars(site.before, site.after, site.allowed)
            told = f"{error_text(site.before)} → {error_text(site.after)}"
            return f'<span class="errors">{told}{bars}</span>'
    return "<span></span>"


def _why(line: Line) -> str:
    reasons = [site.reason for _, site in line.sites if site.reason]
    return f'<small class="why">{escape("; ".join(reasons))}</small>' if reasons else ""


def _short(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count or "")


# why not, and the proof


def _reasons(story: Story) -> str:
    """What stays as it is, by reason."""
    rows = []
    for title, sites in reversed(story.groups.items()):
        if KINDS[title] == "done":
            continue
        reasons: dict[tuple[str, str], list[Site]] = {}
        for site in sites:
            reasons.setdefault((site.reason or "", site.pattern), []).append(site)
        for (reason, pattern), same in sorted(reasons.items(), key=lambda item: -len(item[1])):
            cells = cell(reason, style=f"mark {KINDS[title]}"), cell(pattern, style="name whole")
            rows.append([*cells, cell(f"{len(same):,}", True), _names(same)])
    if not rows:
        return ""
    return f"<h2>What stays, and why</h2>{table(('reason', 'class', 'sites', 'where'), rows)}"


def _names(sites: Sequence[Site]) -> str:
    names = [site.name or "(the model)" for site in alike(sites)]
    more = f" and {len(names) - NAMES:,} more" if len(names) > NAMES else ""
    return cell(", ".join(names[:NAMES]) + more, style="name")


def _proof(proof: Proof | None) -> str:
    if proof is None:
        return ""
    # those that failed, then those that came closest to what is allowed
    tensors = sorted(
        proof.comparisons.items(),
        key=lambda item: (item[1].ok, -item[1].after / (item[1].allowed or 1)),
    )
    failed = sum(not comparison.ok for _, comparison in tensors)
    shown = tensors[: max(TENSORS, failed)]
    scale = Scale(error for _, comparison in shown for error in comparison.relative)
    rows = []
    for name, comparison in shown:
        bars = f'<td style="min-width:9rem">{scale.bars(*comparison.relative)}</td>'
        numbers = [cell(error_text(error), True) for error in comparison.relative]
        said = cell(
            comparison.reason or "ok", style=f"mark {'done' if comparison.ok else 'undone'}"
        )
        rows.append([cell(name, style="name"), *numbers, bars, said])
    rest = len(tensors) - len(shown)
    more = f"<p>and {rest:,} more that are further from what is allowed</p>" if rest else ""
    tall = table(("tensor", "before", "after", "allowed", "", ""), rows, "tall")
    # the printed form says all but the table
    lines = takewhile(lambda line: not line.startswith("tensor "), str(proof).splitlines())
    words = "".join(f'<p class="dim">{escape(line)}</p>' for line in (*lines, PROOF))
    return f"<h2>The proof</h2>{words}{tall}{more}"
