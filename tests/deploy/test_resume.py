"""Going on with a run: what may change, what is refused, what is cut back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mara.buffer.lease import Use, hold_lease
from mara.buffer.server import EmbeddedServer
from mara.common.errors import UserError
from mara.deploy import resume as resume_module
from mara.deploy.config import RunConfig
from mara.deploy.config_file import dump_config
from mara.deploy.console import PlainDisplay, View
from mara.deploy.model_shape import LLMIdentity
from mara.deploy.preflight import Checked
from mara.deploy.progress import Progress, StoppedEarly
from mara.deploy.recorder import Recorder, cut_back
from mara.deploy.resume import (
    Start,
    check_as_it_was,
    check_may_change,
    find_resumed,
    take_over,
    take_run_folder,
    where_it_goes_on,
)
from mara.deploy.run_folder import LogRecord, RunRecord, load_run
from mara.deploy.run_lock import hold_run, who_runs
from mara.deploy.signals import StopSignal
from mara.learner.checkpoint import save_checkpoint


class AtStep:
    """Stands for a learner."""

    def __init__(self, gradient_step: int, num_episodes: int) -> None:
        self.gradient_step, self.num_episodes = gradient_step, num_episodes

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def run(tmp_path: Path, config: RunConfig) -> Path:
    """The folder of a run of 50 episodes that was killed after a checkpoint at 20."""
    learner = config.learner.model_copy(update={"num_episodes": 50})
    (tmp_path / "config.yaml").write_text(dump_config(config.model_copy(update={"learner": learner})))
    RunRecord("run-1", "abc", 1).write(tmp_path)
    save_checkpoint(tmp_path / "checkpoints", AtStep(40, 20))
    return tmp_path


@pytest.fixture
def complete(run: Path) -> Callable[[int], Path]:
    """The same run, complete after so many episodes."""

    def end(num_episodes: int) -> Path:
        save_checkpoint(run / "checkpoints", AtStep(100, num_episodes))
        (run / "agent").mkdir()
        card = {"training": {"complete": True, "episodes": num_episodes}}
        (run / "agent" / "agent.json").write_text(json.dumps(card))
        return run

    return end


def test_a_run_goes_on_from_its_checkpoint_with_its_settings(run: Path) -> None:
    resumed = find_resumed(run, ["learner.num_episodes=70", "wandb.mode=disabled"], pytest.fail)
    assert (resumed.gradient_step, resumed.num_episodes) == (40, 20)
    assert resumed.record == RunRecord("run-1", "abc", 2)
    assert where_it_goes_on(resumed) == (
        "the run goes on from step-00000040-episode-00000020: 20 of 70 episodes, 40 gradient steps"
    )
    assert load_run(run).learner.num_episodes == 50  # so far nothing was touched
    (run / "report.json").write_text("{}")
    take_over(resumed)
    assert load_run(run).learner.num_episodes == 70
    assert [path.name[:9] for path in run.glob("report*.json")] == ["report-20"]
    again = find_resumed(run, [], pytest.fail)
    assert again.record.num_starts == 3
    assert again.config.learner.num_episodes == 70
    assert again.config.wandb.mode == "disabled"


def test_no_two_starts_have_an_actor_of_the_same_name(tmp_path: Path) -> None:
    starts = [Start(tmp_path, RunRecord("run-1", "abc", number), None) for number in (1, 2, 3)]
    names = [name for start in starts for name in start.actor_names(3)]
    assert len(set(names)) == 9
    assert names[:4] == ["actor-0", "actor-1", "actor-2", "actor-0-start-2"]


def test_a_run_that_had_learnt_nothing_begins_at_the_beginning(run: Path) -> None:
    """Whether it was killed before its first checkpoint or stopped before its first episode."""
    (run / "checkpoints").rename(run / "elsewhere")
    for checkpoint in (None, save_checkpoint(run / "nothing", AtStep(0, 0))):
        if checkpoint is not None:
            (run / "nothing").rename(run / "checkpoints")
        resumed = find_resumed(run, [], pytest.fail)
        assert resumed.checkpoint == (checkpoint and run / "checkpoints" / checkpoint.name)
        assert (resumed.gradient_step, resumed.num_episodes) == (0, 0)
        assert where_it_goes_on(resumed) == (
            "the run had learnt nothing yet: training begins at the beginning"
        )


def test_the_server_of_a_run_is_asked_for_where_its_password_is_not_known(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["replay"]["redis_url"] = "redis://:***@host:6379"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(
        UserError, match=r"at redis://:\*\*\*@host:6379, whose password .*; add replay.redis_url"
    ):
        find_resumed(run, [], pytest.fail)
    own = find_resumed(run, ["replay.redis_url=redis://:secret@host:6379"], pytest.fail)
    assert own.config.replay.redis_urls == ("redis://:secret@host:6379",)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(run: Path) -> None:
    newest = save_checkpoint(run / "checkpoints", AtStep(60, 30))
    (newest / "state.json").write_text("{")
    warnings: list[str] = []
    resumed = find_resumed(run, [], warnings.append)
    assert resumed.num_episodes == 20
    assert "step-00000040-episode-00000020, the one before, is used" in warnings[0]


@pytest.mark.parametrize(
    "setting", ["learner.sac.polyak=1", "rewards.x.weight=2", "run.seed=1", "replay.from=x"]
)
def test_settings_that_would_make_it_another_run_are_refused(setting: str) -> None:
    check_may_change(["rollout.num_actors=3", "ray.address=auto", "evaluation.num_prompts=3"])
    with pytest.raises(UserError, match=f"^{setting.partition('=')[0]} stays as the run began; .*num_actors"):
        check_may_change([setting])


def test_a_run_that_goes_on_is_refused(run: Path) -> None:
    with hold_run(run), pytest.raises(UserError, match="this run goes on still"):
        find_resumed(run, [], pytest.fail)


def test_a_complete_run_is_refused_unless_it_is_to_read_more(complete: Callable[[int], Path]) -> None:
    run = complete(50)
    with pytest.raises(UserError, match=r"is complete \(50 episodes\); to train it longer, add learner"):
        find_resumed(run, [], pytest.fail)
    assert find_resumed(run, ["learner.num_episodes=51"], pytest.fail).num_episodes == 50


def test_a_run_that_has_read_a_whole_finished_log_is_complete(complete: Callable[[int], Path]) -> None:
    run = complete(45)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["replay"]["from"] = "/runs/other"
    settings["rollout"]["num_actors"] = 0
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"is complete \(45 episodes\)$"):
        find_resumed(run, ["learner.num_episodes=100"], pytest.fail)


def test_a_complete_run_that_was_to_be_longer_and_ended_early_goes_on(
    complete: Callable[[int], Path],
) -> None:
    """Its settings name the higher number already, its agent is still that of the first end."""
    run = complete(50)
    take_over(find_resumed(run, ["learner.num_episodes=100"], pytest.fail))
    assert find_resumed(run, [], pytest.fail).num_episodes == 50


def test_a_complete_run_whose_last_checkpoint_is_missing_does_the_rest_again(
    complete: Callable[[int], Path],
) -> None:
    run = complete(50)
    (newest,) = (run / "checkpoints").glob("step-*-episode-00000050")
    shutil.rmtree(newest)
    (run / "checkpoints" / "latest").unlink()
    assert find_resumed(run, [], pytest.fail).num_episodes == 20


def found(
    heads: dict[str, dict[str, str]], hidden_size: int = 32, prompts_digest: str = "p", llm_digest: str = "l"
) -> Checked:
    """What the checks of a start found out."""
    return Checked(
        prompts=(),
        prompts_digest=prompts_digest,
        hidden_size=hidden_size,
        llm=LLMIdentity(None, None),
        llm_digest=llm_digest,
        reward_digests=heads,
        base_scores={},
        unpacks_llm=False,
        log=None,
    )


def test_a_run_that_is_no_longer_what_it_was_is_refused(run: Path) -> None:
    heads = {"helpful": {"model": "1"}}
    LogRecord("run-1", None, 32, "l", heads, "p").write(run)
    resumed = find_resumed(run, [], pytest.fail)
    check_as_it_was(resumed, found(heads))
    with pytest.raises(UserError, match="hidden size 33, had 32 when the run began"):
        check_as_it_was(resumed, found(heads, 33))
    with pytest.raises(
        UserError, match=r"^llm\.model: the files of .* have changed since the run began \(l…, now m…\)"
    ):
        check_as_it_was(resumed, found(heads, llm_digest="m"))
    with pytest.raises(UserError, match=r"^rewards\.helpful\.path: the files of .* have changed"):
        check_as_it_was(resumed, found({"helpful": {"model": "2"}}))
    with pytest.raises(
        UserError, match=r"^prompts\.train: .*prompts\.jsonl has changed since the run began;"
    ):
        check_as_it_was(resumed, found(heads, prompts_digest="q"))
    save_checkpoint(run / "checkpoints", AtStep(41, 21))
    with pytest.raises(UserError, match="went on meanwhile"):
        check_as_it_was(resumed, found(heads))
    resumed = find_resumed(run, [], pytest.fail)
    take_over(resumed)  # of another start, which was quicker
    with pytest.raises(UserError, match="went on meanwhile"):
        check_as_it_was(resumed, found(heads))


def test_a_run_folder_is_held_from_its_start_and_when_it_goes_on(config: RunConfig) -> None:
    with take_run_folder(config, found({}), None) as start:
        assert (start.record.num_starts, start.position) == (1, None)
        assert who_runs(start.folder) is not None
        with pytest.raises(UserError, match="this run goes on still"):
            find_resumed(start.folder, [], pytest.fail)
    assert who_runs(start.folder) is None
    resumed = find_resumed(start.folder, ["rollout.num_actors=3"], pytest.fail)
    with take_run_folder(resumed.config, found({}), resumed) as again:
        assert again.record == start.record._replace(num_starts=2)
        assert who_runs(again.folder) is not None
    assert load_run(start.folder).rollout.num_actors == 3
    with pytest.raises(UserError, match="went on meanwhile"), take_run_folder(config, found({}), resumed):
        pass


def test_a_learner_that_outlived_its_run_is_waited_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "logs").mkdir()
    resumed = find_resumed(run, [], pytest.fail)
    learner = hold_run(run / "logs")
    learner.__enter__()
    ending = threading.Event()

    def end() -> None:
        ending.set()
        learner.__exit__(None, None, None)

    threading.Timer(0.3, end).start()
    check_as_it_was(resumed, found({}))
    assert ending.is_set()
    monkeypatch.setattr(resume_module, "PREDECESSOR_S", 0.0)
    with hold_run(run / "logs"), pytest.raises(UserError, match="/logs is in use: its run goes on"):
        check_as_it_was(resumed, found({}))


def test_a_signal_ends_the_waiting_for_a_learner_which_is_told(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "logs").mkdir()
    resumed = find_resumed(run, [], pytest.fail)
    view = View("t", num_episodes=10)
    with StopSignal() as stop, hold_run(run / "logs"):
        progress = Progress(view, PlainDisplay(view), stop)
        threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,)).start()
        with (
            pytest.raises(StoppedEarly),
            take_run_folder(resumed.config, found({}), resumed, progress.wait_out("it")),
        ):
            pass
    assert "waiting for it" in capsys.readouterr().out
    assert who_runs(run) is None
    assert find_resumed(run, [], pytest.fail).record == resumed.record


@pytest.mark.parametrize(
    ("use", "told"), [("reads", "its log is being read"), ("writes", "this run goes on still")]
)
def test_a_run_whose_log_somebody_uses_is_refused(run: Path, use: Use, told: str) -> None:
    with EmbeddedServer(1 << 26) as server, hold_lease([server.url], "run-1", use, 5.0):
        resumed = find_resumed(run, [f"replay.redis_url={server.url}"], pytest.fail)
        with (
            pytest.raises(UserError, match=rf"{told} \(process {os.getpid()} on .*that is known in \d+ s$"),
            take_run_folder(resumed.config, found({}), resumed),
        ):
            pass
    assert load_run(run).replay.redis_url is None  # nothing was taken over


def test_fewer_episodes_than_it_had_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match="num_episodes=19: the run has read 20 already"):
        find_resumed(run, ["learner.num_episodes=19"], pytest.fail)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        find_resumed(tmp_path, [], pytest.fail)


def test_the_record_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    """Also where the last line was not finished, and where two checkpoints lie at one step."""
    rows = [(2.0, 0, 8), (4.0, 10, 15), (6.0, 40, 20), (8.0, 41, 20), (9.0, 44, 23)]
    path = tmp_path / "metrics.jsonl"
    lines = [
        json.dumps({"time_s": t, "learner/gradient_step": step, "episodes/total": episodes})
        for t, step, episodes in rows
    ]
    path.write_text("\n".join(lines) + '\n{"time_s": 9.5, "lear')
    for _ in range(2):
        assert cut_back(path, 40, 20) == (6.0, (44.0, 23.0))
        assert path.read_text() == "\n".join(lines[:3]) + "\n"
    assert cut_back(tmp_path / "elsewhere" / "none", 40, 20) == (0.0, (-1.0, -1.0))


def test_a_record_that_goes_on_has_no_row_twice(tmp_path: Path, config: RunConfig) -> None:
    def row(step: int) -> dict[str, float]:
        return {"learner/gradient_step": float(step), "episodes/total": float(step)}

    sent: list[float] = []

    class Run:
        def log(self, values: dict[str, float]) -> None:
            sent.append(values["learner/gradient_step"])

    def record(steps: list[int], goes_on_from: tuple[int, int] | None = None) -> None:
        recorder = Recorder(tmp_path, config, pytest.fail, "abc", goes_on_from)
        recorder._wandb_run = Run()
        for step in steps:
            recorder.record(row(step))
        recorder._wandb_run = None
        recorder.close()

    record([1, 2, 3, 4])
    record([3], goes_on_from=(2, 2))  # killed again before it was as far
    record([3, 4], goes_on_from=(2, 2))
    record([4, 5], goes_on_from=(3, 3))
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["learner/gradient_step"] for line in written] == [1, 2, 3, 4, 5]
    times = [line["time_s"] for line in written]
    assert times == sorted(times)
    assert sent == [1, 2, 3, 4, 5]


def test_the_remaining_time_goes_by_the_pace_of_this_start() -> None:
    view = View("title", num_episodes=1000)
    view.begin_at(800, 500)
    view.update({"actors/alive": 1.0})
    assert view.first_seen is None  # what was there before says nothing of the pace
    view.update({"episodes/total": 810.0})
    assert view.first_seen is not None and view.first_seen[1] == 810
    assert view.remaining_s is None
    view.first_seen = (view.first_seen[0] - 10, 810)
    view.update({"episodes/total": 850.0})
    assert view.remaining_s == pytest.approx(10 / 40 * 150, rel=0.05)
