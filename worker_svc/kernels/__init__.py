"""Narrow passes of small Llama-shaped models as one compiled function, where numba is installed."""
