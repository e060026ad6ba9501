"""Keys are recognised by their hashes, the file may change, and nothing of a key is ever said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from laps.cli import cli
from laps.errors import Unauthenticated
from laps.security.access import Role
from laps.security.keys import KeyFile, new_key
from laps.security.principal import NOBODY, Principal, Quota
from laps.setting import SettingsError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def write(path: Path, *lines: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text("\n".join(lines))
    fresh.replace(path)


def test_a_key_is_recognised_with_its_tenant_and_quota(path: Path) -> None:
    acme, ops = new_key("acme"), new_key(role="operator")
    write(path, "tenants.acme = { max_queued_requests = 3, requests_per_s = 0.5 }", acme.line, ops.line)
    keys = KeyFile(str(path))
    client = keys.recognise(f"Bearer {acme.key}")
    assert (client.tenant, client.roles) == ("acme", {Role.CLIENT})
    assert client.quota == Quota(max_queued_requests=3, requests_per_s=0.5)
    assert keys.recognise(f"bearer {ops.key}").roles == {Role.OPERATOR}
    assert keys.recognise("") is NOBODY


def test_what_is_not_a_key_is_refused(path: Path) -> None:
    made, other = new_key("acme"), new_key("acme")
    write(path, made.line)
    keys = KeyFile(str(path))
    key_id, secret = made.key.split("_", 2)[1:]
    for bad in (
        made.key,
        f"Basic {made.key}",
        "Bearer",
        "Bearer ",
        f"Bearer {other.key}",
        f"Bearer {made.key}x",
        f"Bearer {made.key[:-1]}",
        f"Bearer laps_{key_id}_{other.key.split('_', 2)[2]}",
        f"Bearer laps_{other.key.split('_', 2)[1]}_{secret}",
        f"Bearer {made.line}",
        "Bearer " + "9" * 100_000,
        "Bearer \u00e4",
    ):
        with pytest.raises(Unauthenticated) as caught:
            keys.recognise(bad)
        assert secret not in str(caught.value)


def test_the_file_holds_no_key() -> None:
    made = new_key("acme")
    assert made.key.split("_", 2)[2] not in made.line
    assert len(made.key.split("_", 2)[2]) == 43, "256 bits"


def test_a_changed_file_counts_at_once_and_a_broken_one_not_at_all(path: Path) -> None:
    first, second = new_key("acme"), new_key("acme")
    write(path, first.line)
    keys = KeyFile(str(path))
    write(path, first.line, second.line)
    assert keys.recognise(f"Bearer {second.key}").tenant == "acme"
    write(path, second.line)
    with pytest.raises(Unauthenticated):
        keys.recognise(f"Bearer {first.key}")
    write(path, "keys.nonsense = 1")
    assert keys.recognise(f"Bearer {second.key}").tenant == "acme"
    path.unlink()
    assert keys.recognise(f"Bearer {second.key}").tenant == "acme"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("keys.0123456789ab = { tenant = 'acme', sha256 = 'SECRETSECRET' }", "sha256"),
        ("keys.0123456789ab = { sha256 = '" + "0" * 64 + "' }", "a client belongs to a tenant"),
        ("keys.0123456789ab = { role = 'worker', sha256 = '" + "0" * 64 + "' }", "role"),
        ("tenants.acme = { max_queued = 3 }", "max_queued"),
        ("tenants.'a:b' = {}", "a:b"),
        ("tenants.acme = { requests_per_s = 0 }", "requests_per_s"),
        ("nonsense = 1", "nonsense"),
        ("= = =", ""),
    ],
)
def test_a_file_that_is_no_good_is_refused_by_name_and_without_its_contents(
    path: Path, line: str, says: str
) -> None:
    write(path, line)
    with pytest.raises(SettingsError) as caught:
        KeyFile(str(path))
    assert says in str(caught.value)
    assert "SECRETSECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_laps_keys_new(path: Path) -> None:
    made = CliRunner().invoke(cli, ["keys", "new", "--tenant", "acme", "--append", str(path)])
    assert made.exit_code == 0, made.output
    second = CliRunner().invoke(cli, ["keys", "new", "--role", "operator", "--append", str(path)])
    keys = KeyFile(str(path))
    assert keys.recognise(f"Bearer {made.output.strip()}").tenant == "acme"
    assert keys.recognise(f"Bearer {second.output.strip()}").roles == {Role.OPERATOR}
    assert path.stat().st_mode & 0o077 == 0
    shown = CliRunner().invoke(cli, ["keys", "new", "--tenant", "acme"])
    assert shown.stdout.startswith("laps_")
    assert "sha256" in shown.stderr
    assert isinstance(CliRunner().invoke(cli, ["keys", "new"]).exception, SettingsError)


def test_keys_that_are_made_together_are_all_there(path: Path) -> None:
    command = [sys.executable, "-m", "laps.cli", "keys", "new", "--tenant", "acme", "--append", str(path)]
    making = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    made = [each.communicate()[0].strip() for each in making]
    keys = KeyFile(str(path))
    assert [keys.recognise(f"Bearer {key}").tenant for key in made] == ["acme"] * 6
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_file_of_keys_stays_what_it_was(path: Path) -> None:
    """Whom it belongs to, who may read it, and where it lies."""
    path.write_text(new_key("acme").line)
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12_345, 12_346)
    before = path.stat()
    linked = path.with_name("linked.toml")
    linked.symlink_to(path)
    for file in (path, linked):
        done = CliRunner().invoke(cli, ["keys", "new", "--tenant", "acme", "--append", str(file)])
        assert done.exit_code == 0, done.output
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert linked.is_symlink()
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["absent/keys.toml", "folder"])
def test_laps_keys_new_names_the_file_that_it_cannot_write(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    file = tmp_path / name
    made = CliRunner().invoke(cli, ["keys", "new", "--tenant", "acme", "--append", str(file)])
    assert str(file) in str(made.exception)
    assert f".{file.name}" not in str(made.exception)
    assert "laps_" not in made.output
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_clients_own_key_is_not_shown() -> None:
    environment = os.environ | {"LAPS_API_KEY": "laps_do_not_show"}
    command = [sys.executable, "-m", "laps.cli", "config", "--json"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "do_not_show" not in said.stdout + said.stderr
    assert "***" in said.stdout
    assert json.loads(said.stdout)


def test_ids_of_tenants_never_meet() -> None:
    acme, other = (Principal("k", frozenset({Role.CLIENT}), tenant) for tenant in ("acme", "other"))
    assert acme.stored_id("x") != other.stored_id("x")
    assert acme.shown_id(acme.stored_id("x")) == "x"
    assert Principal("op", frozenset({Role.OPERATOR})).stored_id("acme:x") == acme.stored_id("x")
