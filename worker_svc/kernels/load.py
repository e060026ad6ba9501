"""The compiled narrow pass, for a process that has no compiler in it.

numba takes a second to load and five to compile. So it runs in a process of its own, once for a machine and a
version of the sources; what it makes is kept in the user's cache folder and loaded by llvmlite in a few
hundredths of a second. Where no folder can be written, each process has it compiled anew.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parent
_SOURCES = ("__init__.py", "lanes.py", "narrow_pass.py", "build.py")
_BUILD_LIMIT_S = 300.0
_CHECK_LIMIT_S = 60.0
# Named by numba's way to report an exception, of which the pass raises none.
_NEVER_CALLED = (
    "NRT_Free",
    "numba_do_raise",
    "numba_gil_ensure",
    "numba_gil_release",
    "numba_runtime_build_excinfo_struct",
    "numba_unpickle",
)
_POINTER, _INDEX = ctypes.c_void_p, ctypes.c_int64
_Prototype = ctypes.CFUNCTYPE(
    None, _POINTER, *[_INDEX] * 2, *[_POINTER] * 3, _INDEX, _POINTER, *[_INDEX] * 7, ctypes.c_float,
    *[_POINTER] * 3, *[_INDEX] * 2, *[_POINTER] * 8,
)  # fmt: skip


@functools.cache
def narrow_pass() -> Callable[..., None] | None:
    """`narrow_pass.narrow_pass`, which takes pointers as integers and lets go of the interpreter's lock; None
    where it cannot be had.
    """
    try:
        path = _folder() / _key()
        code = _read(path)
        if code is None:
            code = _built()
            _write(path, code)
        return load(code)
    except metadata.PackageNotFoundError as missing:
        log.info("narrow passes are not compiled: %s is not installed", missing.name)
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        log.warning("narrow passes are not compiled: %s", error)
    return None


def load(code: bytes) -> Callable[..., None]:
    """The function in what `build` has written."""
    from llvmlite import binding

    name, _, machine_code = code.partition(b"\n")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    abort = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    for symbol in _NEVER_CALLED:
        if binding.address_of_symbol(symbol) is None:
            binding.add_symbol(symbol, abort)
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(machine_code))
    engine.finalize_object()
    function: Any = _Prototype(engine.get_function_address(name.decode()))
    # It lives in the memory of the engine.
    function.engine = engine
    return function  # type: ignore[no-any-return]


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "laps"


def _key() -> str:
    """Differs between machines, sources and compilers that do not make the same code."""
    from llvmlite import binding

    digest = hashlib.sha256()
    for source in _SOURCES:
        digest.update((_HERE / source).read_bytes())
    compiler = [metadata.version("numba"), metadata.version("llvmlite"), sys.version]
    machine = [binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()]
    digest.update("\n".join([*compiler, *machine]).encode())
    return f"narrow-pass-{digest.hexdigest()[:32]}"


def _read(path: Path) -> bytes | None:
    """What `_write` has left; None for a file that is broken, or that another could have written."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read()
    except OSError:
        return None
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(hashlib.sha256(code).digest() + code)
                file.close()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
    except OSError as error:
        log.info("the compiled narrow pass is not kept: %s", error)


def _built() -> bytes:
    """Compiled by one process, and tried by a second: LLVM ends a process that lacks a symbol."""
    code = _run("build", b"", _BUILD_LIMIT_S)
    _run("load", code, _CHECK_LIMIT_S)
    return code


def _run(module: str, given: bytes, limit_s: float) -> bytes:
    path = os.pathsep.join(filter(None, [str(_HERE.parent.parent), os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(
        # -P: not what lies in the folder where the process happens to run.
        [sys.executable, "-P", "-m", f"worker_svc.kernels.{module}"],
        input=given,
        capture_output=True,
        timeout=limit_s,
        env=os.environ | {"PYTHONPATH": path},
    )
    if ended.returncode:
        lines = ended.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"{module} ended with {ended.returncode}: {lines[-1] if lines else ''}")
    return ended.stdout


if __name__ == "__main__":
    load(sys.stdin.buffer.read())
