"""All checks: importing them fills the registry."""

# first, for what writes out of bounds should hear it from the check of memory
from . import check_values

# isort: split
from . import check_interface, check_torch, traffic
from .registry import CHECKS as CHECKS, Check as Check, cases_of as cases_of

__all__ = [
    "CHECKS",
    "Check",
    "cases_of",
    "check_interface",
    "check_torch",
    "check_values",
    "traffic",
]
