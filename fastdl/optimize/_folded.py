"""A model's tree with its sites, as lines to draw: repeated layers are one."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from .report import Site, worst
from .tree import Node, names


class Line(NamedTuple):
    """One line of the tree: a module, or neighbours whose trees are alike in all but errors."""

    first: Node
    last: Node
    # how many it stands for here; a folded layer above it stands for more
    times: int
    # the full name; what differs in the folded ones is a *
    path: str
    # the group of each site, and the one of those that are alike with the largest error
    sites: list[tuple[str, Site]]
    # the group of the neighbour that runs this module with it, and what to say of that
    part_of: tuple[str, str] | None
    lines: "list[Line]"
    # how many sites of each group there are below
    below: Counter[str]

    @property
    def height(self) -> int:
        """How many lines there are below."""
        return sum(1 + line.height for line in self.lines)


def folded(root: Node, groups: Mapping[str, Sequence[Site]]) -> Line:
    """The line of the model, with all others in it."""
    sites: dict[str, list[tuple[str, Site]]] = {}
    known = set(names(root))
    for title, members in groups.items():
        for site in members:
            name = site.name if site.name in known else site.name.partition(" (")[0]
            # a call that a graph makes in no module of the tree is the model's own
            sites.setdefault(name if name in known else "", []).append((title, site))
    folder = _Folder(sites)
    folder.note(root)
    return folder.line([root], "", 1)


class _Folder:
    def __init__(self, sites: Mapping[str, list[tuple[str, Site]]]) -> None:
        self.sites = sites
        self.part_of: dict[str, tuple[str, str]] = {}
        # a number for each kind of tree, by name and by what it is made of
        self.kinds: dict[str, int] = {}
        self.known: dict[object, int] = {}

    def note(self, node: Node) -> None:
        """Find those modules that a neighbour runs, and number the kinds of trees."""
        for index, child in enumerate(node.children):
            for title, site in self.sites.get(child.name, ()):
                _, *rest = site.pattern.split(" + ")
                after = node.children[index + 1 : index + 1 + len(rest)]
                if [other.cls for other in after] == rest:
                    words = f"in one op with {child.key}"
                    self.part_of |= {other.name: (title, words) for other in after}
        for child in node.children:
            self.note(child)
        told = [(title, *site[1:5]) for title, site in self.sites.get(node.name, ())]
        below = [(child.key, self.kinds[child.name]) for child in node.children]
        facts = (node.cls, node.parameters, node.same_as, *told, self.part_of.get(node.name))
        kind = (facts, tuple(below))
        self.kinds[node.name] = self.known.setdefault(kind, len(self.known))

    def line(self, nodes: list[Node], path: str, times: int) -> Line:
        """The line of nodes that are alike, of which the first `times` are neighbours."""
        first = nodes[0]
        lines = []
        for run in self._runs(first):
            key = "*" if len(run) > 1 else first.children[run[0]].key
            members = [node.children[index] for node in nodes for index in run]
            lines.append(self.line(members, f"{path}.{key}" if path else key, len(run)))
        found = zip(*(self.sites.get(node.name, ()) for node in nodes), strict=True)
        sites = [(same[0][0], worst([site for _, site in same])) for same in found]
        below: Counter[str] = Counter()
        for line in lines:
            own = Counter(title for title, _ in line.sites)
            for title, count in (own + line.below).items():
                below[title] += line.times * count
        part_of = self.part_of.get(first.name)
        return Line(first, nodes[times - 1], times, path, sites, part_of, lines, below)

    def _runs(self, node: Node) -> Iterator[list[int]]:
        """Indices of children: those with numbers for names that are alike are together."""

        def kind(index: int) -> object:
            child = node.children[index]
            return self.kinds[child.name] if child.key.isdigit() else child.name

        for _, run in groupby(range(len(node.children)), kind):
            yield list(run)
