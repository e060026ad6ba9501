"""Compiles the narrow pass for this machine and writes it to standard output:

    python -m worker_svc.kernels.build

A process of its own, so that a worker has neither the time nor the memory of a compiler in it; see `load`.
"""

from __future__ import annotations

import sys

from numba import cfunc

from .narrow_pass import SIGNATURE, narrow_pass


def build() -> tuple[str, bytes]:
    """Name of the function, and the machine code that holds it."""
    function = cfunc(SIGNATURE, error_model="numpy")(narrow_pass)
    # What numba keeps in its own cache, too; there, to load it takes all of numba.
    _, _, (code, _) = function._library.serialize_using_object_code()
    return function.native_name, code


if __name__ == "__main__":
    name, code = build()
    sys.stdout.buffer.write(name.encode() + b"\n" + code)
