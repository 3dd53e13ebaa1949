"""The graph engine: `torch.compile(model, backend="fastdl")` puts fused ops into the graph."""

from .backend import backend as backend, last_report as last_report, sites as sites
from .rewrite import rewrite as rewrite
