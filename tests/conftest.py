"""Plain Python is tested, also where a compiled build lies about; `make test-compiled` sets the variable."""

import os

os.environ.setdefault("LAPS_COMPILED", "0")
