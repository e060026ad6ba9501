"""`laps keys`: API keys for a gateway's file of keys."""

from __future__ import annotations

import os
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
    before = file.read_text() if file.exists() else ""
    text = before + ("" if not before or before.endswith("\n") else "\n") + made.line + "\n"
    check_text(text, str(file))
    # Gateways may read it at any moment, so it changes in one step.
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fresh.touch(mode=0o600)
        try:
            fresh.write_text(text)
            fresh.replace(file)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        # By itself it would name the other file, which nobody knows of.
        raise LocalError(f"{file}: cannot be written: {error.strerror}") from None
    click.echo(made.key)
