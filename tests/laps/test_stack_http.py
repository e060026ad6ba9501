"""Where a stack serves OpenAI's clients."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from laps import stack as stack_module
from laps.settings import Settings
from laps.stack import Stack, StackError
from laps.up import needed_variables, own_command, welcome
from tests.certificates import HERE, Authority


def chosen(tmp_path: Path, *, any_ports: bool = False, **settings: int) -> Stack:
    given = {"port": 0, "scheduler_port": 0} | settings
    stack = Stack(Settings(data_dir=tmp_path, redis_url="redis://elsewhere", **given), any_ports=any_ports)
    stack._choose_ports()
    return stack


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A socket on the port that is otherwise taken."""
    listening = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(stack_module, "USUAL_HTTP_PORT", listening.getsockname()[1])
    return listening


def test_the_usual_port_or_any_free_one(tmp_path: Path, usual: socket.socket) -> None:
    port = usual.getsockname()[1]
    assert chosen(tmp_path).http_port not in (0, port)
    usual.close()
    stack = chosen(tmp_path)
    assert stack.http_port == port
    assert f"http://127.0.0.1:{port}/v1" in welcome(stack)
    assert f"http://127.0.0.1:{port}/console" in welcome(stack)
    without = chosen(tmp_path, console=False)
    assert "/v1" in welcome(without)
    assert "console" not in welcome(without)
    assert chosen(tmp_path, any_ports=True).http_port not in (0, port)


def test_who_names_a_port_means_it(tmp_path: Path, usual: socket.socket) -> None:
    port = usual.getsockname()[1]
    with usual, pytest.raises(StackError, match=f"port {port} is in use; choose another with --http-port"):
        chosen(tmp_path, http_port=port)
    assert chosen(tmp_path, http_port=port).http_port == port


def test_zero_is_off(tmp_path: Path) -> None:
    stack = chosen(tmp_path, http_port=0)
    assert stack.http_url == ""
    assert "OpenAI" not in welcome(stack)
    assert "console" not in welcome(stack)


def test_the_command_to_try_is_one_that_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = tmp_path / "bin" / "laps"
    installed.parent.mkdir()
    installed.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.argv", ["bin/laps", "up"])
    assert own_command() == "bin/laps"
    monkeypatch.setenv("PATH", str(installed.parent))
    assert own_command() == "laps"
    monkeypatch.setattr("sys.argv", ["/elsewhere/laps/cli/__main__.py", "up"])
    assert own_command() == "laps"


def test_the_command_to_try_says_what_its_client_must_set(tmp_path: Path) -> None:
    keys = Settings(api_keys_file="keys.toml")
    assert needed_variables(Settings()) == ""
    assert needed_variables(keys) == "LAPS_API_KEY=KEY "
    files = Authority().write(tmp_path, *HERE)
    secure = Settings(tls_cert=files.certificate, tls_key=files.key, tls_ca=files.authorities)
    assert needed_variables(secure) == f"LAPS_TLS_CA={files.authorities} "
