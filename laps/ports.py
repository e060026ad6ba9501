"""Free TCP ports for processes that are about to be started.

Two processes that look for ports at the same time must not find the same ones. So whoever finds a TCP port
also binds the UDP port of that number, which nobody here uses, and keeps it: to others it is taken, from the
moment it is found, and also while the child that is to listen on it is started again.
"""

from __future__ import annotations

import random
import socket
from collections import deque
from collections.abc import Collection, Sequence

# Below the range from which systems take the local ports of outgoing connections: a child that is started
# again finds its port free.
_FIRST, _LAST = 20_000, 32_000
_TRIES = 1_000
_kept: deque[socket.socket] = deque(maxlen=256)
"""The latest reservations of this process, and of no child; bounded, as each is an open file."""


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on it now; 0: on any port at all."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError:
            return False
    return True


def free_ports(
    count: int, host: str = "127.0.0.1", *, avoid: Collection[int] = (), in_a_row: bool = False
) -> list[int]:
    """Different ports that are free at this moment, none of them in `avoid`. `in_a_row`: of consecutive
    numbers, for whoever is told the first one and counts on.

    Raises OSError when there are none.
    """
    rng = random.Random()
    at_once = count if in_a_row else 1
    found: list[int] = []
    for _ in range(_TRIES):
        if len(found) == count:
            return found
        first = rng.randrange(_FIRST, _LAST - at_once + 1)
        row = range(first, first + at_once)
        if not any(port in found or port in avoid for port in row) and _take(row, host):
            found += row
    raise OSError(f"no {count} free ports between {_FIRST} and {_LAST}")


def _take(row: Sequence[int], host: str) -> bool:
    """Reserves all of these ports, or none."""
    signs: list[socket.socket] = []
    for port in row:
        sign = _reserve(port, host) if is_free(port, host) else None
        if sign is None:
            for taken in signs:
                taken.close()
            return False
        signs.append(sign)
    _kept.extend(signs)
    return True


def _reserve(port: int, host: str) -> socket.socket | None:
    """None: another process, or an earlier call here, has found this port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sign = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sign.bind((host.strip("[]"), port))
    except OSError:
        sign.close()
        return None
    return sign
