"""Measured launch configurations: where the tables are, how they are read and written."""

from ..ops._launch import Config, Device, Margin, device_of
from ..ops._tuned import (
    CANDIDATES,
    MAX_BYTES,
    SCHEMA,
    check,
    forced,
    forget,
    key_of,
    load,
    lookup,
    packaged_file,
    read,
    slug,
    user_file,
    write,
)

__all__ = [
    "CANDIDATES",
    "MAX_BYTES",
    "SCHEMA",
    "Config",
    "Device",
    "Margin",
    "check",
    "device_of",
    "forced",
    "forget",
    "key_of",
    "load",
    "lookup",
    "packaged_file",
    "read",
    "slug",
    "user_file",
    "write",
]
