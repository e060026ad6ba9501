"""Narrow passes of small Llama-shaped models as one compiled function, where numba is installed.

Its sizes stand here, where whoever calls it can read them without a compiler.
"""

LANES = 8
"""Numbers that are computed at once, and positions whose attention is."""
PANEL = 16
"""Columns of a panel of weights: as many as one row of a tile accumulates at once."""
