"""The files in ``deploy/cluster/``: Ray takes them, and what the README there says works."""

from __future__ import annotations

import copy
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import redis
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import mara.deploy.config_file
from mara.deploy.config_file import dump_config, find_config, load_config

FOLDER = Path(mara.deploy.config_file.__file__).parent / "cluster"
FILES = sorted(FOLDER.glob("*.yaml"))
README = (FOLDER / "README.md").read_text()
PLACEHOLDER = re.compile(r"(?<![$_])\b[A-Z]+_(?:ADDRESS|ID|USER)\b")

by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def validate(content: dict[str, Any]) -> dict[str, Any]:
    """What ``ray up`` does with a file before it asks the provider for anything."""
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(content))
    validate_config(prepared)
    return prepared


def commands(content: dict[str, Any]) -> str:
    return "\n".join(line for key, lines in content.items() if key.endswith("_commands") for line in lines)


def test_there_is_a_file_for_own_machines_and_one_for_a_cloud() -> None:
    assert {yaml.safe_load(path.read_text())["provider"]["type"] for path in FILES} == {"local", "aws"}


@by_file
def test_ray_accepts_the_file(path: Path) -> None:
    content = yaml.safe_load(path.read_text())

    prepared = validate(content)

    types = prepared["available_node_types"]
    workers = sum(node_type["min_workers"] for node_type in types.values())
    assert workers == prepared["max_workers"] == {"local": 2, "aws": 4}[content["provider"]["type"]]
    assert prepared["head_node_type"] in types


@by_file
@pytest.mark.parametrize("section", [None, "auth"])
def test_ray_refuses_the_file_with_a_misspelt_key(path: Path, section: str | None) -> None:
    content = yaml.safe_load(path.read_text())
    place = content if section is None else content[section]
    name = "setup_commands" if section is None else "ssh_user"
    place[name.replace("s", "z", 1)] = place.pop(name)

    with pytest.raises((jsonschema.ValidationError, KeyError)):
        validate(content)


@by_file
def test_the_readme_explains_what_is_to_be_filled_in(path: Path) -> None:
    used = set(PLACEHOLDER.findall(path.read_text()))
    rows = [line for line in README.splitlines() if line.startswith("| `") and f"`{path.name}`" in line]

    assert used == {placeholder for row in rows for placeholder in PLACEHOLDER.findall(row)}


@by_file
def test_every_node_takes_part_on_the_same_port_with_the_token_and_the_heads_private_address(
    path: Path,
) -> None:
    content = yaml.safe_load(path.read_text())
    head, worker = content["head_start_ray_commands"][-1], content["worker_start_ray_commands"][-1]

    (port,) = re.findall(r"--port=(\d+)", head)
    (ray_address,) = re.findall(r"--node-ip-address=(\$\(.*?\)|\S+)", head)
    assert f"--address=$RAY_HEAD_IP:{port}" in worker
    assert content["head_start_ray_commands"][-2].endswith(f"store.py start {ray_address}")
    assert "~/.ray/auth_token" in content["file_mounts"]
    assert "environment.sh" in commands(content) and "password" not in commands(content)


@by_file
def test_the_files_that_the_commands_use_are_there(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    root = FOLDER.parent.parent

    named = set(re.findall(r"mara/((?!\.venv)[\w./]+\.(?:py|sh))", commands(content) + README))

    assert named == {"deploy/cluster/store.py", "deploy/cluster/environment.sh"}
    assert all((root / name).is_file() for name in named)


def words(line: str, program: str) -> list[str]:
    """The words with which a shell calls ``program`` in ``line``."""
    script = f"{program}() {{ printf '%s\\n' \"$@\"; }}; {line}"
    shell = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    return shell.stdout.splitlines()


def test_the_readmes_training_command_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = [line for line in README.splitlines() if "mara train" in line and line.startswith("ray exec")]
    change_folder, _, remote = words(line, "ray")[-1].partition(" && ")
    command, name, *overrides = words(remote, "mara")
    monkeypatch.setenv("MARA_STORE_URL", "redis://:secret@10.0.0.1:6379")

    config = load_config(find_config(name), overrides)

    assert (change_folder, command) == ("cd ~/mara", "train")
    assert config.ray.address == "auto"
    assert config.replay.redis_url == "redis://:secret@10.0.0.1:6379"
    assert "secret" not in dump_config(config)
    aws = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    assert config.rollout.num_actors == aws["max_workers"]


def store(folder: Path, *arguments: str) -> None:
    command = [sys.executable, str(FOLDER / "store.py"), "--folder", str(folder), *arguments]
    subprocess.run(command, check=True, timeout=60)


def test_the_store_is_behind_a_password_that_only_its_owner_can_read(tmp_path: Path) -> None:
    folder = tmp_path / ".mara"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    try:
        store(folder, "start", "127.0.0.1", "--port", str(port))
        url = (folder / "store_url").read_text()
        client = redis.Redis.from_url(url)
        client.set("episode", "kept")
        store(folder, "start", "127.0.0.1", "--port", str(port))

        assert (folder / "store_url").read_text() == url
        assert client.get("episode") == b"kept"
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
        assert (folder / "store_url").stat().st_mode & 0o077 == 0
        server = psutil.Process(int(client.info("server")["process_id"]))
        password = url.split("@")[0].rpartition(":")[2]
        assert password not in " ".join(server.cmdline())
        listening = {connection.laddr.ip for connection in server.net_connections() if not connection.raddr}
        assert listening == {"127.0.0.1"}

        script = f'. "{FOLDER / "environment.sh"}" && printf "%s %s" "$MARA_STORE_URL" "$RAY_AUTH_MODE"'
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        shell = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True)
        assert shell.stdout == f"{url} token"
    finally:
        store(folder, "stop")
    assert not (folder / "store_url").exists()
    with pytest.raises(redis.ConnectionError):
        client.ping()
