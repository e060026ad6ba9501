"""`python -m laps.cli`, where the `laps` script is not on the path."""

import sys

from laps.cli import main

if __name__ == "__main__":
    sys.exit(main())
