"""`laps config`: the settings in force."""

from __future__ import annotations

import click

from laps.cli.options import print_json, settings_options
from laps.setting import env_name, flag_name, type_name, used_by
from laps.settings import Settings, unknown_variables


@click.command()
@settings_options()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def config(settings: Settings, as_json: bool) -> None:
    """Show every setting, its value, and whether a flag, the environment, a file or the default gave it."""
    rows = [
        {
            "name": name,
            "value": settings.public(name),
            "source": settings.origin(name).source,
            "origin": settings.origin(name).detail,
            "flag": flag_name(name),
            "variable": env_name(name),
            "type": type_name(field),
            "used_by": list(used_by(field)),
            "help": field.description,
        }
        for name, field in Settings.model_fields.items()
    ]
    if as_json:
        print_json(rows)
    else:
        width = max(len(str(row["name"])) for row in rows)
        values = [str(row["value"]) if row["value"] != "" else "-" for row in rows]
        value_width = min(max(map(len, values)), 48)
        for row, value in zip(rows, values, strict=True):
            came_from = f"{row['source']} {row['origin']}".rstrip()
            click.echo(f"{row['name']:<{width}}  {value:<{value_width}}  {came_from}")
    for variable in unknown_variables():
        click.echo(f"laps: {variable} is set but there is no such setting", err=True)
