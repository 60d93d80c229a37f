"""What the folder of a run or a comparison names is called for whoever began it, and else only if asked."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from mara.deploy.cli import app
from mara.deploy.comparison.config import RECORD
from mara.deploy.config import RunConfig
from mara.deploy.config_file import dump_config, load_config
from mara.deploy.resume import find_resumed, take_over
from mara.deploy.run_folder import CONFIG_FILE, RunRecord, fill_folder, write_settings
from mara.deploy.trust import is_own
from mara.learner.checkpoint import save_checkpoint

CALLED = "called"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this user's key is."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "mara"


@pytest.fixture
def run(tiny_run: tuple[Path, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of this user's with a reward function, which says that it was called."""
    folder, _ = tiny_run
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge_of_trust.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / CALLED)!r}).touch()\n"
        "def score(prompts, responses): return [float(len(response)) for response in responses]\n"
    )
    words = ["kind=function", "function=judge_of_trust:score", "weight=1"]
    overrides = [f"rewards.words.{word}" for word in words]
    config = load_config(tmp_path / "tiny.yaml", [*overrides, "shaping.terminal=last"])
    write_settings(folder, dump_config(config))
    return folder


def mara(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result: Result, *parts: str) -> bool:
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("mara: error: ")]
    return result.exit_code == 2 and all(part in line for part in (*parts, "add --trust"))


def of_somebody_else(folder: Path, state: Path) -> None:
    """Signed by the same command with another key."""
    state.rename(state.with_name("mine"))
    write_settings(folder, (folder / CONFIG_FILE).read_text())
    shutil.rmtree(state)
    state.with_name("mine").rename(state)


def passed(result: Result) -> bool:
    """What it names would be called: what is wrong beyond that is told."""
    return result.exit_code == 2 and "prompts.evaluation is not set" in result.stderr


NO_PROMPTS = "prompts.evaluation=null"


def test_ones_own_run_is_evaluated_and_that_of_somebody_else_only_if_trusted(
    run: Path, tmp_path: Path, state: Path
) -> None:
    assert passed(mara("eval", run, NO_PROMPTS))
    of_somebody_else(run, state)
    for words in (("eval", run), ("calibrate", run)):
        assert refused(mara(*words), "rewards.words.function=judge_of_trust:score", str(run))
    assert not (tmp_path / CALLED).exists()
    assert passed(mara("eval", run, NO_PROMPTS, "--trust"))
    assert "none.txt" in mara("calibrate", run, "--prompts", "none.txt", "--trust").stderr
    write_settings(run, (run / CONFIG_FILE).read_text())
    run.rename(tmp_path / "moved")
    assert passed(mara("eval", tmp_path / "moved", NO_PROMPTS))


def test_what_the_user_names_is_called_and_what_names_nothing_needs_no_trust(
    run: Path, tmp_path: Path, state: Path
) -> None:
    of_somebody_else(run, state)
    assert passed(mara("eval", run, NO_PROMPTS, "rewards.words.function=judge_of_mine:score"))
    assert "PROMPT is empty" in mara("generate", run, "").stderr
    (run / CONFIG_FILE).write_text(dump_config(load_config(tmp_path / "tiny.yaml")))
    assert passed(mara("eval", run, NO_PROMPTS))


class AtStep:
    """Stands for a learner."""

    gradient_step, num_episodes = 40, 20

    def state_dict(self) -> dict[str, Any]:
        return {}


THEIRS, MINE = "replay.redis_url=redis://10.0.0.1:6379", "replay.redis_url=redis://10.0.0.2:6379"


@pytest.mark.parametrize(
    ("named", "own"),
    [
        (["rewards.words.function=judge_of_trust:score"], []),
        ([THEIRS], [MINE]),
        (["ray.address=10.0.0.1:6379", THEIRS], ["ray.address=auto", MINE]),
    ],
)
def test_a_run_goes_on_where_it_is_ones_own_or_trusted(
    run: Path, tmp_path: Path, state: Path, named: list[str], own: list[str]
) -> None:
    source = tmp_path / "tiny.yaml" if own else run / CONFIG_FILE
    write_settings(run, dump_config(load_config(source, named)))
    RunRecord("run-1", "abc", 1).write(run)
    save_checkpoint(run / "checkpoints", AtStep())
    assert find_resumed(run, [], pytest.fail).folder == run
    of_somebody_else(run, state)
    for dry_run in ((), ("--dry-run",)):
        assert refused(mara("train", "--resume", run, *dry_run), *named)
    assert not own or find_resumed(run, own, pytest.fail).folder == run
    take_over(find_resumed(run, [], pytest.fail, is_trusted=True))
    assert find_resumed(run, [], pytest.fail).record.num_starts == 3  # it is one's own from there on


def test_a_comparison_goes_on_where_it_is_ones_own_or_trusted(tmp_path: Path, state: Path) -> None:
    folder = tmp_path / "comparison"
    folder.mkdir()
    content: dict[str, Any] = {
        "llm": {"model": "m"},
        "systems": {"base": {"kind": "llm"}, "sampled": {"kind": "llm", "sampling": True}},
        "datasets": {"d": {"path": str(tmp_path / "none.jsonl")}},
        "judges": {"big": {"kind": "llm_judge", "url": "http://10.0.0.1/v1", "model": "big"}},
        "baseline": "base",
    }
    fill_folder(folder, yaml.safe_dump(content))
    (folder / RECORD).write_text("{}")
    of_somebody_else(folder, state)
    for words in ((), ("--dry-run",), ("seed=1",)):
        assert refused(mara("eval", "--resume", folder, *words), "judges.big.url=http://10.0.0.1/v1")
    assert "none.jsonl cannot be read" in mara("eval", "--resume", folder, "--trust").stderr
    write_settings(folder, (folder / CONFIG_FILE).read_text())
    assert "none.jsonl cannot be read" in mara("eval", "--resume", folder).stderr


def test_settings_are_ones_own_as_they_were_written_and_by_a_whole_key(run: Path, state: Path) -> None:
    settings = run / CONFIG_FILE
    assert is_own(settings)
    assert stat.S_IMODE((state / "key").stat().st_mode) == 0o600
    text = settings.read_text()
    settings.write_text(text.replace("words", "terms"))
    assert not is_own(settings)
    settings.write_text(text)
    assert is_own(settings)
    (state / "key").write_bytes(b"")  # what anybody could sign with
    write_settings(run, text)
    assert not is_own(settings)


def test_a_user_without_a_place_for_a_key_trains_all_the_same(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    (run / "config.hmac").unlink()
    write_settings(run, (run / CONFIG_FILE).read_text())
    assert refused(mara("eval", run))
    assert passed(mara("eval", run, NO_PROMPTS, "--trust"))


def test_episodes_of_somebody_else_are_read_only_if_trusted(run: Path, tmp_path: Path, state: Path) -> None:
    episodes = ["train", tmp_path / "tiny.yaml", f"replay.from={run}", "rollout.num_actors=0", "--dry-run"]
    shutil.rmtree(run / "replay", ignore_errors=True)
    (run / "replay.json").unlink(missing_ok=True)
    own = mara(*episodes)
    assert "no replay.json" in own.stderr and "--trust" not in own.stderr
    of_somebody_else(run, state)
    assert refused(mara(*episodes), f"replay.from={run}")
    of_none = mara(*episodes[:2], f"replay.from={tmp_path / 'none'}", *episodes[3:])
    assert of_none.exit_code == 2
    assert "none does not exist" in of_none.stderr and "--trust" not in of_none.stderr
    assert "no replay.json" in mara(*episodes, "--trust").stderr


def test_a_key_that_others_may_read_or_that_a_folder_brings_along_is_none(
    run: Path, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_own(run / CONFIG_FILE)
    (state / "key").chmod(0o644)
    assert not is_own(run / CONFIG_FILE)
    (state / "key").chmod(0o600)
    assert is_own(run / CONFIG_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert not is_own(run / CONFIG_FILE)


def test_trust_is_for_folders(tmp_path: Path) -> None:
    for words in (("train", "quickstart"), ("eval", "compare")):
        result = mara(*words, "--trust")
        assert result.exit_code == 2 and "--trust belongs to" in result.stderr
