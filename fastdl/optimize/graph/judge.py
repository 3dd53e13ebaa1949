"""Proof of graphs at compile time: each site on what it is called with, then the whole graph."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ..._table import progress
from .._judge import copied, eager, no_trace
from .._locate import culprit
from ..memory import insist_on_room
from ..replay import Outcome, judged
from ..verify import Proof, Reference
from .names import qualified
from .pair import Key, Pair
from .rewrite import CHECKPOINT, Choice, parts, rewrite
from .tidy import tidy
from .twin import Held, concrete, outside_of_compile, twin, without_dropout

UNSTABLE = (
    "even with nothing replaced the graph differs from itself, as one does that draws random "
    "numbers of its own"
)


class Verdict(NamedTuple):
    """What is known of each site, and of the whole graph if it was run."""

    known: dict[Key, Outcome]
    proof: Proof | None = None

    @property
    def faults(self) -> frozenset[str]:
        return frozenset(outcome.fault for outcome in self.known.values() if outcome.fault)


def prove(
    gm: GraphModule, example_inputs: Sequence[Any], choice: Choice, whole: bool = True
) -> Verdict:
    """Judge what `rewrite(gm, choice)` would do. The graph, its inputs and all of torch's state
    stay as they are. With `whole`, sites that fail only together are found too.
    """
    training = torch.is_grad_enabled()
    with outside_of_compile(), no_trace(), eager():
        trial = _Trial(gm, list(map(concrete, example_inputs)), choice, training)
        return trial.run(whole)


class _Trial:
    def __init__(
        self, gm: GraphModule, inputs: Sequence[Any], choice: Choice, training: bool
    ) -> None:
        self.gm, self.tidied = twin(gm), twin(gm)
        for body, _ in parts(self.tidied):  # where sites stand
            tidy(body.graph)
            body.recompile()
        self.inputs, self.choice, self.training = inputs, choice, training
        self.known: dict[Key, Outcome] = {}

    def run(self, whole: bool) -> Verdict:
        kept = self._judge_sites()
        if not whole or not kept:
            return Verdict(self.known)
        held = self._held(twin(self.gm))
        insist_on_room(held, held)
        reference = Reference(held, (), {})

        def attempt(chosen: Sequence[Key]) -> Proof:
            try:
                return reference.compare(copied(self._held(self._rewritten(chosen))))
            except Exception as error:  # whatever a kernel does, its site can be told
                return Proof.of_failure(error)

        proven = False
        while (fault := (proof := attempt(kept)).fault()) is not None:
            if not proven and not (unchanged := attempt(())):
                self._refuse(kept, UNSTABLE)
                return Verdict(self.known, unchanged)
            proven = True
            index, found = culprit(kept, lambda some: attempt(some).fault(), fault)
            self._refuse([kept[index]], f"with it the whole graph fails: {found.reason}")
            kept = self._judge_sites()
        return Verdict(self.known, proof)

    def _judge_sites(self) -> list[Key]:
        """Judge until no site is new: one that fails may make room for another. Those that pass."""
        while True:
            pairs: list[Pair] = []
            rewrite(twin(self.tidied), replace(self.choice, known=self.known, keep=pairs.append))
            new = [pair for pair in pairs if pair.key not in self.known]
            if not new:
                return [pair.key for pair in pairs][::-1]
            with progress("replay") as tell:
                original = cast(GraphModule, copied(self.tidied))
                without_dropout(original)
                replay = _Replay(original, new, self._note(len(new), tell))
                with torch.set_grad_enabled(self.training):
                    replay.run(*map(_given, self.inputs), enable_io_processing=False)
            for pair in new:
                self.known.setdefault(pair.key, Outcome("not called with these inputs"))

    def _note(
        self, count: int, tell: Callable[[int, int, str], None]
    ) -> Callable[[Pair, Outcome], None]:
        def note(pair: Pair, outcome: Outcome) -> None:
            self.known[pair.key] = outcome
            tell(len(self.known), max(count, len(self.known)), "sites")

        return note

    def _refuse(self, keys: Sequence[Key], reason: str) -> None:
        for key in keys:
            self.known[key] = self.known[key]._replace(fault=reason)

    def _rewritten(self, chosen: Sequence[Key]) -> GraphModule:
        made = twin(self.gm)
        known = {key: self.known[key] for key in chosen}
        rewrite(made, replace(self.choice, known=known, only_known=True))
        return made

    def _held(self, gm: GraphModule) -> Held:
        nodes = gm.graph.find_nodes(op="placeholder")
        names = [qualified(node) for node in nodes]
        if len(set(names)) < len(names):
            names = [node.name for node in nodes]
        return Held(without_dropout(gm), dict(zip(names, self.inputs, strict=True)), self.training)


def _given(value: Any) -> Any:
    """A copy of an input: a leaf that needs a gradient is one, and the rest may be written to."""
    if not isinstance(value, Tensor):
        return value
    clone = value.detach().clone().requires_grad_(value.requires_grad)
    return clone if value.is_leaf else clone.clone()


class _Replay(Interpreter):
    """Runs a graph, and judges each site on what it is called with, under the graph's own modes."""

    def __init__(
        self,
        gm: GraphModule,
        pairs: Sequence[Pair],
        note: Callable[[Pair, Outcome], None],
        part: str = "",
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.pairs, self.note, self.part = pairs, note, part
        self.nodes = {part + node.name: node for node in gm.graph.nodes}

    def run_node(self, n: Node) -> Any:
        for pair in self.pairs:
            if pair.last == self.part + n.name:
                values = {name: self.env[self.nodes[name]] for name in pair.inputs}
                self.note(pair, _judged(pair, values))
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The body of a checkpoint runs node by node; nothing here is computed twice."""
        if target is not CHECKPOINT or not isinstance(args[0], GraphModule):
            return super().call_function(target, args, kwargs)
        (name,) = (name for name, body in self.module.named_children() if body is args[0])
        inner = _Replay(args[0], self.pairs, self.note, f"{self.part}{name}.")
        return inner.run(*args[1:], enable_io_processing=False)


def _judged(pair: Pair, values: dict[str, Any]) -> Outcome:
    training = torch.is_grad_enabled()
    before, after = (
        Held(without_dropout(form), values, training) for form in (pair.before, pair.after)
    )
    return judged(before, after, (), {})
