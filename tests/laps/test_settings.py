from __future__ import annotations

import re
from pathlib import Path

import pytest

from laps.setting import SettingsError, mask_url, used_by
from laps.settings import (
    BUILT_IN_DRAFT,
    BUILT_IN_TARGET,
    Settings,
    load_settings,
    unknown_variables,
)

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("clean_environment")


def test_sources_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("laps.toml").write_text("port = 1\nslots = 2\nworkers = 3\n")
    monkeypatch.setenv("LAPS_PORT", "10")
    monkeypatch.setenv("LAPS_SLOTS", "20")
    settings = load_settings({"port": 100, "policy": None})
    assert (settings.port, settings.slots, settings.workers, settings.policy) == (100, 20, 3, "laps-sd")
    origins = [str(settings.origin(name)) for name in ("port", "slots", "workers", "policy")]
    assert origins == ["flag --port", "environment LAPS_SLOTS", "file laps.toml", "default"]


def test_the_config_file_is_chosen_by_flag_then_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, port in (("laps.toml", 1), ("variable.toml", 2), ("flag.toml", 3)):
        (tmp_path / name).write_text(f"port = {port}\n")
    assert load_settings().port == 1
    monkeypatch.setenv("LAPS_CONFIG", "variable.toml")
    assert load_settings().port == 2
    assert load_settings(config="flag.toml").port == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"port": 70000}, ["port", "65535", "--port"]),
        ({"slots": "many"}, ["slots", "integer", "many", "--slots"]),
        ({"log_level": "loud"}, ["log_level", "debug", "--log-level"]),
        ({"drain_s": "nan"}, ["drain_s", "--drain-s"]),
        ({"pool": "a{b}"}, ["pool", "A-Za-z", "--pool"]),
        ({"redis_url": "http://u:hidden@h"}, ["redis_url", "redis://", "***", "--redis-url"]),
        ({"otlp_endpoint": "collector:4317"}, ["otlp_endpoint", "http://HOST:PORT", "--otlp-endpoint"]),
        ({"otlp_endpoint": "http://:4317"}, ["otlp_endpoint", "http://HOST:PORT"]),
        ({"scheduler_address": "nowhere"}, ["scheduler_address", "HOST:PORT"]),
        ({"policy": ""}, ["policy", "at least 1 character", "--policy"]),
        ({"draft_tokens": 0}, ["draft_tokens", "greater than or equal to 1", "--draft-tokens"]),
        ({"retention_s": 0}, ["retention_s", "greater than 0", "--retention-s"]),
        ({"nonsense": 1}, ["nonsense", "no such setting", "--nonsense"]),
    ],
)
def test_a_bad_value_is_one_line_that_names_setting_and_source(
    flags: dict[str, object], says: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags)
    message = str(caught.value)
    assert "\n" not in message
    assert "hidden" not in message
    for part in says:
        assert part in message


def test_bad_values_of_other_sources_are_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPS_SLOTS", "0")
    with pytest.raises(SettingsError, match=r"slots: .*LAPS_SLOTS"):
        load_settings()
    monkeypatch.delenv("LAPS_SLOTS")
    Path("laps.toml").write_text("slots = -1\n")
    with pytest.raises(SettingsError, match=r"slots: .*laps\.toml"):
        load_settings()
    Path("laps.toml").write_text("slots = = 1\n")
    with pytest.raises(SettingsError, match=r"laps\.toml cannot be read"):
        load_settings()
    with pytest.raises(SettingsError, match=r"no file gone\.toml .*--config"):
        load_settings(config="gone.toml")


def test_kubernetes_service_variables_are_not_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPS_PORT", "tcp://10.0.0.1:50051")
    assert load_settings().port == 50051


def test_misspelt_variables_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPS_PROT", "1")
    monkeypatch.setenv("LAPS_CONFIG", "")
    assert unknown_variables() == ["LAPS_PROT"]


def test_the_password_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAPS_REDIS_URL", "redis://me:hidden@host:1/0")
    settings = load_settings()
    assert "hidden" not in repr(settings) + str(settings) + str(settings.public("redis_url"))
    assert settings.to_env()["LAPS_REDIS_URL"] == "redis://me:hidden@host:1/0"


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://:secret@h:1", "redis://:***@h:1"),
        ("redis://u:s@h", "redis://u:***@h"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("unix:///s?password=x&db=1", "unix:///s?password=***&db=1"),
    ],
)
def test_mask_url(url: str, masked: str) -> None:
    assert mask_url(url) == masked


def test_a_child_gets_the_same_settings() -> None:
    settings = load_settings({"port": 7, "target": "/m", "starvation_bound_s": "1.5"})
    env = settings.to_env(worker_id="worker-1", redis_url="redis://h")
    assert env == {
        "LAPS_PORT": "7",
        "LAPS_TARGET": "/m",
        "LAPS_STARVATION_BOUND_S": "1.5",
        "LAPS_WORKER_ID": "worker-1",
        "LAPS_REDIS_URL": "redis://h",
        "LAPS_ORIGINS": env["LAPS_ORIGINS"],
    }


def test_a_child_says_where_its_parent_had_a_value_from(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("laps.toml").write_text("slots = 3\n")
    monkeypatch.setenv("LAPS_WORKERS", "5")
    parent = load_settings({"policy": "nope"})
    for name, value in parent.to_env(redis_url="redis://h", port=7).items():
        monkeypatch.setenv(name, value)
    child = load_settings()
    assert (child.policy, child.slots, child.workers, child.port) == ("nope", 3, 5, 7)
    origins = [str(child.origin(name)) for name in ("policy", "slots", "workers", "port")]
    assert origins == ["flag --policy", "file laps.toml", "environment LAPS_WORKERS", "environment LAPS_PORT"]
    assert not unknown_variables()
    monkeypatch.setenv("LAPS_SLOTS", "0")
    with pytest.raises(SettingsError, match=r"slots: .* not '0' \(from file laps.toml\)"):
        load_settings()


def test_a_child_has_nothing_that_its_parent_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("laps.toml").write_text("slots = 3\n")
    Path("chosen.toml").write_text("port = 7\n")
    monkeypatch.setenv("LAPS_DRAFT", "/elsewhere")
    parent = load_settings({"draft": ""}, "chosen.toml")
    assert (parent.slots, parent.port, parent.draft) == (4, 7, "")
    for name, value in parent.to_env().items():
        monkeypatch.setenv(name, value)
    child = load_settings()
    assert (child.slots, child.port, child.draft) == (4, 7, "")
    # An embedder's own settings say all, too.
    for name, value in Settings(port=8).to_env().items():
        monkeypatch.setenv(name, value)
    assert (load_settings().draft, load_settings().port) == ("", 8)


def test_the_built_in_draft_goes_with_the_built_in_target_alone() -> None:
    assert Settings().draft_model == BUILT_IN_DRAFT
    assert Settings(draft="none").draft_model is None
    assert Settings(target="/other").draft_model is None
    assert Settings(target="/other", draft="/small").draft_model == "/small"
    assert Settings().target == BUILT_IN_TARGET


def test_a_missing_model_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"target: the model folder .*gone.* is not there.*--target"):
        load_settings({"target": str(tmp_path / "gone")}).check_models()
    settings = load_settings({"target": str(tmp_path)})
    with pytest.raises(SettingsError, match=r"target: .* has no config.json, .*--target"):
        settings.check_models()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(SettingsError, match=r"target: .* has no \*.safetensors weights"):
        settings.check_models()
    (tmp_path / "model.safetensors").touch()
    settings.check_models()
    monkeypatch.chdir(tmp_path.parent)
    load_settings({"target": tmp_path.name}).check_models()
    for draft in ("organisation/name", "name"):
        settings = load_settings({"target": tmp_path.name, "draft": draft})
        with pytest.raises(
            SettingsError, match=rf"draft: the model folder {draft} is not there \(models are "
        ):
            settings.check_models()


@pytest.mark.parametrize(
    ("host", "address"),
    [("localhost", "localhost:7"), ("::", "127.0.0.1:7"), ("fe80::1", "[fe80::1]:7"), ("[::1]", "[::1]:7")],
)
def test_where_a_client_finds_the_gateway(host: str, address: str) -> None:
    assert Settings(host=host, port=7).gateway_address == address


def test_instance_ids_are_fit_for_keys() -> None:
    assert Settings(worker_id="w-1").instance_id("worker") == "w-1"
    assert Settings(worker_id=Settings().instance_id("worker")).instance_id("worker")


def test_services_read_the_settings_that_they_take() -> None:
    folders = {"gateway": "gateway", "scheduler": "scheduler_svc", "worker": "worker_svc"}
    by_all = "".join(path.read_text() for path in (ROOT / "laps").rglob("*.py") if path.name != "stack.py")
    for service, folder in folders.items():
        code = by_all + "".join(path.read_text() for path in (ROOT / folder).rglob("*.py"))
        taken = {name for name, field in Settings.model_fields.items() if service in used_by(field)}
        unread = {name for name in taken if not re.search(rf"\.{name}\b", code)}
        assert unread <= {f"{service}_id"}, f"{service} does not read {unread}"


def test_every_setting_says_what_it_is_and_who_reads_it() -> None:
    from laps.setting import type_name

    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert type_name(field), name
        assert used_by(field) or name in ("gateways", "workers"), name
        if isinstance(field.default, float):
            assert name.endswith("_s"), f"{name} has no unit in its name"
