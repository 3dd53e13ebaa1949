"""Modules of other libraries. A form says how a module's forward is fastdl's own; what a module
may be is told from its children, attributes and shapes, and a probe decides.
"""

from .form import form_of as form_of
from .recognition import (
    forget as forget,
    names_of_children as names_of_children,
    recognise as recognise,
    with_form as with_form,
)
