"""Measured launch configurations: where the tables are, how they are read and written, and `fastdl.tune`."""

from ..ops._launch import Config as Config, Device as Device
from ..ops._tuned import (
    CANDIDATES as CANDIDATES,
    MAX_BYTES as MAX_BYTES,
    SCHEMA as SCHEMA,
    check as check,
    forced as forced,
    forget as forget,
    key_of as key_of,
    load as load,
    lookup as lookup,
    packaged_file as packaged_file,
    read as read,
    slug as slug,
    user_file as user_file,
    write as write,
)
