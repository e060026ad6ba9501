"""Settings, command lines and images in the manifests are real ones."""

from __future__ import annotations

import re
import shlex
import subprocess

import click
import pytest
import rendered
import yaml
from rendered import DEPLOY, K8S, ROOT, Object, container, name, of_kind

from laps import runtime
from laps.cli import cli
from laps.setting import ENV_PREFIX, env_name, used_by
from laps.settings import Settings

COMPOSE = DEPLOY / "docker" / "docker-compose.yaml"
DOCKERFILES = [DEPLOY / "docker" / f"Dockerfile.{kind}" for kind in ("cpu", "cuda")]
SETTING_OF = {env_name(setting): setting for setting in Settings.model_fields}
PINNED = re.compile(r"[a-z-]+:\d+\.\d+\.\d+(-[a-z-]+)?")


def check_values(role: str, values: dict[str, str], where: str) -> None:
    """Every variable is a setting that this service reads, with a value that it takes."""
    for variable in values:
        assert variable in SETTING_OF, f"{where}: {variable} is no setting"
    Settings(**{SETTING_OF[variable]: value for variable, value in values.items()})


def test_every_variable_is_a_setting_with_a_good_value(objects: list[Object]) -> None:
    for workload in of_kind(objects, "Deployment"):
        check_values(rendered.role(workload), rendered.environment(objects, workload), name(workload))


def test_a_roles_own_variables_are_read_by_it(objects: list[Object]) -> None:
    for workload in of_kind(objects, "Deployment"):
        role = rendered.role(workload)
        own = [
            each
            for each in of_kind(objects, "ConfigMap")
            if name(each) == container(workload)["envFrom"][1]["configMapRef"]["name"]
        ]
        variables = {*own[0]["data"], *(each["name"] for each in container(workload)["env"])}
        unread = {v for v in variables if role not in used_by(Settings.model_fields[SETTING_OF[v]])}
        assert not unread, f"{role} does not read {unread}"


def test_secret_has_the_variables_that_are_asked_of_it() -> None:
    objects = rendered.render("dev")
    (secret,) = of_kind(objects, "Secret")
    asked = {
        each["valueFrom"]["secretKeyRef"]["key"]
        for workload in of_kind(objects, "Deployment")
        for each in container(workload)["env"]
        if "secretKeyRef" in each.get("valueFrom", {})
    }
    assert asked == {"LAPS_REDIS_URL"}
    assert asked <= set(secret["stringData"])


def test_only_the_dev_overlay_has_a_password() -> None:
    for overlay in ("gpu", "ha"):
        assert not of_kind(rendered.render(overlay), "Secret")


def made_secret(*password: str) -> Object:
    script = K8S / "components" / "redis" / "make-secret.sh"
    said = subprocess.run(["sh", str(script), *password], capture_output=True, text=True, check=True).stdout
    return yaml.safe_load(said)


def test_committed_secrets_are_what_the_script_makes() -> None:
    made = made_secret("development-only")
    assert yaml.safe_load((K8S / "overlays/dev/redis-secret.yaml").read_text()) == made
    assert (DEPLOY / "docker" / "users.acl").read_text() == made["stringData"]["users.acl"]
    compose = yaml.safe_load(COMPOSE.read_text())["services"]["scheduler"]["environment"]
    assert compose["LAPS_REDIS_URL"] == made["stringData"]["LAPS_REDIS_URL"]


def test_passwords_are_new_each_time() -> None:
    one, other = made_secret()["stringData"], made_secret()["stringData"]
    passwords = [each[key] for each in (one, other) for key in ("LAPS_REDIS_URL", "operator-password")]
    assert len(set(passwords)) == 4
    assert not any(each["operator-password"] in each["users.acl"] for each in (one, other))


def test_command_lines_are_those_of_laps(objects: list[Object]) -> None:
    for workload in of_kind(objects, "Deployment"):
        init, dash, program, command, *flags = rendered.command_line(workload)
        assert (init, dash, program) == ("tini-static", "--", "laps")
        assert command == rendered.role(workload)
        check_command(command, flags)


def check_command(command: str, flags: list[str]) -> None:
    context = click.Context(cli)
    found = cli.get_command(context, command)
    assert found is not None, f"there is no command laps {command}"
    found.make_context(command, flags, parent=context)


def test_images_are_pinned_and_ours_are_of_this_version(objects: list[Object]) -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for workload in of_kind(objects, *rendered.WORKLOADS):
        image = container(workload)["image"]
        assert PINNED.fullmatch(image), image
        if image.startswith("laps"):
            assert image.split(":")[1] == version


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix[1:])
def test_dockerfile(dockerfile: rendered.Path) -> None:
    lines = list(rendered.instructions(dockerfile))
    build, final = (rest for kind, rest in lines if kind == "FROM")
    assert PINNED.fullmatch(final)
    assert build == f"{final} AS build", "what was built runs on what it was built on"
    (user,) = (rest for kind, rest in lines if kind == "USER")
    assert user == "10001:10001"

    pips = [rest for kind, rest in lines if kind == "RUN" and "pip install" in rest]
    torch = next(
        line for line in (ROOT / "requirements/run.txt").read_text().split() if line.startswith("torch==")
    )
    assert pips[0] == f"python -m pip install {torch} ${{PIP_ARGS}}", "torch first, as run.txt pins it"
    assert pips[1] == "python -m pip install -r requirements/run.txt"

    sources = {
        source
        for kind, rest in lines
        if kind == "COPY" and not rest.startswith("--from")
        for source in shlex.split(rest)[:-1]
    }
    assert all((ROOT / source).exists() for source in sources)
    assert {"models", "deploy/docker/health.py"} <= sources
    ignored = dockerfile.with_name(dockerfile.name + ".dockerignore").read_text().split("\n")
    assert sources == {line[1:] for line in ignored if line.startswith("!")}, "what reaches the builder"


def test_every_package_is_in_the_images() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    include = project["tool"]["setuptools"]["packages"]["find"]["include"]
    for dockerfile in DOCKERFILES:
        copied = {rest.split()[0] for kind, rest in rendered.instructions(dockerfile) if kind == "COPY"}
        assert {pattern.rstrip("*") for pattern in include} <= copied


def test_compose() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    services = {role: each for role, each in compose["services"].items() if "profiles" not in each}
    assert set(services) == {"redis", "scheduler", "worker", "gateway"}
    for role, service in services.items():
        assert PINNED.fullmatch(service["image"])
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert int(service["user"].split(":")[0]) > 0
        assert service["mem_limit"]
        assert service["healthcheck"]["test"][0] == "CMD"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "nobody is asked for a key"
        values = {k: v for k, v in service.get("environment", {}).items() if k.startswith(ENV_PREFIX)}
        if role != "redis":
            check_values(role, values, f"compose: {role}")
            check_command(service["command"][0], service["command"][1:])
            grace_s = int(service["stop_grace_period"].removesuffix("s"))
            assert grace_s >= float(values["LAPS_DRAIN_S"]) + 5
            *_, port, health = service["healthcheck"]["test"]
            assert port in values.values()
            assert health in (runtime.ALIVE, runtime.READY)
    mounted = [volume.split(":")[0] for volume in services["redis"]["volumes"] if volume.startswith(".")]
    assert mounted
    assert all((COMPOSE.parent / path).is_file() for path in mounted)
    networks = {role: set(service["networks"]) for role, service in services.items()}
    talk = {(a, b) for a in networks for b in networks if a < b and networks[a] & networks[b]}
    assert talk == {
        ("redis", "scheduler"),
        ("scheduler", "worker"),
        ("gateway", "scheduler"),
        ("gateway", "worker"),
    }
    assert compose["networks"]["store"] == {"internal": True}


def test_compose_with_monitoring() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert all(each["logging"] == {"driver": "local"} for each in services.values()), "logs are bounded"
    extra = {role: each for role, each in services.items() if "profiles" in each}
    assert set(extra) == {"prometheus", "grafana"}
    for service in extra.values():
        assert service["profiles"] == ["monitoring"]
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        mounts = [volume.split(":")[0] for volume in service["volumes"] if volume.startswith(".")]
        assert mounts
        assert all((COMPOSE.parent / path).exists() for path in mounts)
    targets = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"][0]
    for target in targets["static_configs"][0]["targets"]:
        role, port = target.split(":")
        assert services[role]["environment"]["LAPS_METRICS_PORT"] == port
