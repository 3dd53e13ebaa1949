"""torch's optimizers with the step of many tensors in one launch: same constructors, same state."""

from .adamw import AdamW as AdamW
from .sgd import SGD as SGD
