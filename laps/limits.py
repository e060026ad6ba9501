"""Bounds of what a request may ask: gateways hold clients to them, the scheduler holds gateways to them."""

from __future__ import annotations

MAX_PRIORITY = 100
"""Either way: from -MAX_PRIORITY to MAX_PRIORITY."""
MAX_LOGPROBS = 20
"""Alternatives of a token whose log probabilities can be asked for."""
MAX_REQUEST_ID_CHARS = 128
"""Without its tenant."""
INT32_MAX = (1 << 31) - 1
