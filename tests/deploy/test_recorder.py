"""The record of a run: JSON lines always, W&B where it works."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mara.common.errors import UserError
from mara.deploy.config import RunConfig, WandbConfig
from mara.deploy.recorder import Recorder, check_wandb, wandb_mode


@pytest.fixture
def said() -> list[str]:
    return []


def lines(folder: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_record_is_one_line_with_its_time(tmp_path: Path, config: RunConfig, said: list[str]) -> None:
    recorder = Recorder(tmp_path, config, said.append)
    recorder.record({"learner/gradient_step": 1.0, "sac/entropy": 0.5})
    recorder.record({"learner/gradient_step": 2.0, "episode/reward": float("nan")})
    first, second = lines(tmp_path)  # Readable while the recorder is open.
    recorder.close()
    assert first["sac/entropy"] == 0.5
    assert second["episode/reward"] is None
    assert first["time_s"] is not None
    assert second["time_s"] is not None
    assert 0 <= first["time_s"] <= second["time_s"]


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline"),
        ("online", {}, "online"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_wandb_is_offline_unless_there_is_a_login(
    tmp_path: Path, mode: str, environment: dict[str, str], expected: str
) -> None:
    environment = {"NETRC": str(tmp_path / "none"), **environment}
    assert wandb_mode(WandbConfig.model_validate({"mode": mode}), environment) == expected


@pytest.mark.parametrize(
    ("mode", "environment", "part"),
    [
        ("online", {}, "wandb.mode=online: there is no W&B login"),
        ("auto", {"WANDB_MODE": "online"}, r"WANDB_MODE=online.*wandb\.mode=offline"),
        ("auto", {"WANDB_MODE": "nonsense"}, "WANDB_MODE=nonsense: allowed are online"),
    ],
)
def test_going_online_without_a_login_is_refused_in_one_line(
    tmp_path: Path, mode: str, environment: dict[str, str], part: str
) -> None:
    with pytest.raises(UserError, match=part):
        check_wandb(WandbConfig.model_validate({"mode": mode}), {"NETRC": str(tmp_path), **environment})


def test_a_full_disk_ends_the_file_and_is_told_once(
    tmp_path: Path, config: RunConfig, said: list[str]
) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    recorder = Recorder(tmp_path, config, said.append)
    recorder.record({"learner/gradient_step": 1.0})
    recorder.record({"learner/gradient_step": 2.0})
    recorder.close()
    assert said == ["metrics.jsonl ends here: No space left on device; the run goes on"]


def test_a_login_in_netrc_is_found(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert wandb_mode(WandbConfig(), {"NETRC": str(netrc)}) == "online"
    assert wandb_mode(WandbConfig(), {"NETRC": str(netrc), "WANDB_BASE_URL": "https://own"}) == "offline"


def test_an_offline_run_is_kept_in_the_run_folder(
    tmp_path: Path, config: RunConfig, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr("sys.argv", ["mara", "replay.redis_url=redis://:s3cret@host"])
    secret = config.replay.model_copy(update={"redis_url": "redis://host/0?password=s3cret"})
    recorder = Recorder(tmp_path, config.model_copy(update={"replay": secret}), said.append)
    recorder.start_wandb()
    recorder.record({"learner/gradient_step": 1.0, "sac/entropy": 0.5})
    recorder.summarise({"eval/joint": 0.3})
    recorder.close()
    assert said == []
    assert recorder.wandb_folder is not None
    (file,) = recorder.wandb_folder.glob("*.wandb")
    assert file.stat().st_size > 0
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"s3cret" not in path.read_bytes(), path


def test_a_failure_of_wandb_is_told_once_and_the_file_goes_on(
    tmp_path: Path, config: RunConfig, said: list[str]
) -> None:
    class Broken:
        def log(self, values: object) -> None:
            raise OSError("disk quota exceeded")

    recorder = Recorder(tmp_path, config, said.append)
    recorder._wandb_run = Broken()
    for step in range(3):
        recorder.record({"learner/gradient_step": float(step)})
    recorder.close()
    assert len(lines(tmp_path)) == 3
    assert said == ["W&B is off from here: disk quota exceeded; metrics.jsonl goes on"]
