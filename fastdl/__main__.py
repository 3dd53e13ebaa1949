"""`python -m fastdl` is `fastdl`."""

import sys

from .cli import main

sys.exit(main())
