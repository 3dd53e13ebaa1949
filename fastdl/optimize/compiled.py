"""What there is to say about the graphs of a compiled model, besides their sites."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .verify import Proof


class Break(NamedTuple):
    """Where Dynamo had to end a graph, and why."""

    place: str
    reason: str


class Graph(NamedTuple):
    """One graph: seconds of the engine, of the proof and of Dynamo's whole compilation, if it still
    knows them.
    """

    engine_s: float
    proof_s: float = 0.0
    whole_s: float | None = None
    proof: Proof | None = None
    ended_by: Break | None = None
    # why nothing was replaced in it
    failure: str | None = None


class Compiled:
    """The graphs that torch.compile made of a model so far."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self.graphs = tuple(graphs)

    @property
    def breaks(self) -> list[Break]:
        """Each once, though graphs are compiled again for other shapes."""
        return list(dict.fromkeys(graph.ended_by for graph in self.graphs if graph.ended_by))

    @property
    def share(self) -> float | None:
        """The engine's part of the seconds that torch.compile took."""
        timed = [graph for graph in self.graphs if graph.whole_s]
        whole = sum(graph.whole_s or 0.0 for graph in timed)
        return sum(graph.engine_s for graph in timed) / whole if whole else None

    def __str__(self) -> str:
        lines = [f"graphs: {len(self.graphs)}"]
        lines += [f"graph break at {place}: {reason}" for place, reason in self.breaks]
        lines.append(self._seconds())
        for number, graph in enumerate(self.graphs, 1):
            if graph.failure is not None:
                lines.append(f"graph {number} runs as it was: {graph.failure}")
            elif graph.proof is not None:
                lines.append(f"graph {number}: {str(graph.proof).splitlines()[0]}")
        return "\n".join(lines)

    def _seconds(self) -> str:
        engine = f"seconds: {sum(graph.engine_s for graph in self.graphs):.3f} of the graph engine"
        whole, share = sum(graph.whole_s or 0.0 for graph in self.graphs), self.share
        if share is not None:
            engine += f", {whole:.3f} of torch.compile as a whole: {share:.1%}"
        proof = sum(graph.proof_s for graph in self.graphs)
        return f"{engine}; {proof:.3f} of proof" if proof else engine

    def as_dict(self) -> dict[str, Any]:
        def row(graph: Graph) -> dict[str, Any]:
            ended = graph.ended_by and graph.ended_by._asdict()
            proof = graph.proof and graph.proof.as_dict()
            return {**graph._asdict(), "proof": proof, "ended_by": ended}

        return {"share": self.share, "graphs": [row(graph) for graph in self.graphs]}
