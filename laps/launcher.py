"""Runs a command that dies with the process that started it, however that one dies.

    python -I -S launcher.py PARENT_PID COMMAND [ARGUMENT...]

It asks the kernel to kill it when its parent ends (Linux; elsewhere it only runs the command), and becomes
the command. A program of its own, because code between fork and exec of a threaded process may lock up.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            # It ended before we asked.
            sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
