"""All checks: importing them fills the registry."""

from . import check_interface, check_torch, check_values
from .registry import CHECKS as CHECKS, Check as Check, cases_of as cases_of

__all__ = ["CHECKS", "Check", "cases_of", "check_interface", "check_torch", "check_values"]
