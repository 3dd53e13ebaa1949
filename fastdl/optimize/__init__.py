"""The optimizer: `fastdl.optimize(model)` is a call, its parts are the modules in this folder."""

from .._verb import make_callable
from .plan import optimize

make_callable(__name__, optimize)
