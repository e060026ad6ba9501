"""`laps keys`: API keys for a gateway's file of keys."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from laps.errors import LocalError


@click.group()
def keys() -> None:
    """Make API keys."""


@keys.command()
@click.option("--tenant", default="", metavar="NAME", help="Whose key it is; a client must belong to one.")
@click.option("--role", type=click.Choice(["client", "operator"]), default="client", show_default=True,
              help="An operator sees the whole pool.")  # fmt: skip
@click.option("--append", "file", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the line to this file's end instead of showing it.")  # fmt: skip
def new(tenant: str, role: str, file: Path | None) -> None:
    """Make a key. It is shown once; the file that gateways read gets its hash alone."""
    from laps.security.keys import check_text, new_key

    made = new_key(tenant, role)
    if file is None:
        click.echo(made.key)
        click.echo(f"For the file of keys: {made.line}", err=True)
        return
    try:
        _append(file.resolve(), made.line, lambda text: check_text(text, str(file)))
    except OSError as error:
        # By itself it would name another file, which nobody knows of.
        raise LocalError(f"{file}: cannot be written: {error.strerror}") from None
    click.echo(made.key)


def _append(file: Path, line: str, check: Callable[[str], None]) -> None:
    with _alone(file.parent):
        old = file.stat() if file.exists() else None
        before = file.read_text() if old else ""
        text = before + ("" if not before or before.endswith("\n") else "\n") + line + "\n"
        check(text)
        # Gateways may read it at any moment, so it changes in one step.
        fresh = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            fresh.touch(mode=0o600)
            fresh.write_text(text)
            if old is not None:
                # Whoever could read it still can: a gateway may be another user.
                if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                    os.chown(fresh, old.st_uid, old.st_gid)
                fresh.chmod(stat.S_IMODE(old.st_mode))
            fresh.replace(file)
        finally:
            fresh.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time replaces files of keys in this folder. The file itself cannot be locked: another
    takes its place."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
