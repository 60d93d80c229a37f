"""What a death means, with processes that die on command."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from mara.actors.reward_models.config import FunctionRewardConfig
from mara.common.errors import UserError
from mara.deploy.cli import main
from mara.deploy.config import RunConfig
from mara.deploy.exit import RunFailed
from mara.deploy.fleet import Rates, fleet_metrics
from mara.deploy.learner_host import LearnerHost, LearnerSpec
from mara.deploy.process import LOADING, RUNNING, Ended, Report
from mara.deploy.progress import StoppedEarly
from mara.deploy.reward_host import RewardSpec
from mara.deploy.rollout_host import RolloutSpec
from mara.deploy.run_lock import hold_run
from mara.deploy.supervisor import Supervisor
from mara.deploy.topology import _environment, learner_gpus
from mara.learner.loop import LearnerSummary

SUMMARY = LearnerSummary(1, 1, 2, 3, 4, 0.0, 0.5, 6.0, stopped=False)


class FakeHandle:
    """Stands for a process: reports what it is given, ends when it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.report: Report | None = None
        self.heard = False
        self.ended: Ended | None = None
        self.killed = self.stop_requested = False
        self.num_restarts: int

    def runs(self, **metrics: float) -> None:
        self.report, self.heard = Report(RUNNING, 1, dict(metrics), []), True

    def poll(self) -> Ended | None:
        return self.ended

    def take_rows(self) -> list[dict[str, float]]:
        return []

    def request_stop(self) -> None:
        self.stop_requested = True

    def kill(self) -> None:
        self.killed = True


class FakePlaces:
    """Stands for the cluster; keeps every handle it gave out."""

    def __init__(self) -> None:
        self.handles: dict[str, FakeHandle] = {}
        self.rollouts: list[RolloutSpec] = []

    def place_reward(self, spec: RewardSpec) -> Any:
        handle = self.handles.setdefault(spec.name, FakeHandle(spec.name))
        handle.num_restarts = 0
        return handle

    def remote_models(self, config: RunConfig, handles: Any) -> Any:
        return {name: [one.name for one in its] for name, its in handles.items()}

    def place_learner(self, spec: LearnerSpec) -> Any:
        return self.handles.setdefault(spec.name, FakeHandle(spec.name))

    def place_rollout(self, spec: RolloutSpec) -> Any:
        assert spec.name not in self.handles
        self.rollouts.append(spec)
        return self.handles.setdefault(spec.name, FakeHandle(spec.name))

    def resources(self) -> dict[str, float]:
        return {"CPU": 2.0}


class Run:
    """A supervisor on fakes, with what it said."""

    def __init__(
        self, config: RunConfig, folder: Path, num_actors: int = 2, num_rewards: int = 0, **ray: float
    ) -> None:
        (folder / "logs").mkdir(exist_ok=True)
        config = config.model_copy(update={"ray": config.ray.model_copy(update=ray)})
        self.places = FakePlaces()
        self.said: list[str] = []
        learner = LearnerSpec("learner", config, "run", folder, 32, {})
        rollouts = [RolloutSpec(f"actor-{n}", config, "run", folder, ()) for n in range(num_actors)]
        rewards = [
            RewardSpec(f"reward-words-{n}", config, "run", folder, "words", folder)
            for n in range(num_rewards)
        ]
        self.supervisor = Supervisor(self.places, learner, rollouts, self.said.append, rewards)
        for handle in self.places.handles.values():
            handle.runs(**({"rollout/tokens_total": 100.0} if handle.name != "learner" else {}))

    def __getitem__(self, name: str) -> FakeHandle:
        return self.places.handles[name]


@pytest.fixture
def run(config: RunConfig, tmp_path: Path) -> Run:
    return Run(config, tmp_path)


def test_a_dead_actor_is_replaced_and_counted(run: Run) -> None:
    run["actor-1"].ended = Ended(died=True)
    status = run.supervisor.poll()
    assert status.metrics["actors/restarted"] == 1
    assert status.metrics["actors/alive"] == 1
    assert run["actor-1"].killed
    assert run.said == ["actor-1 died; actor-1-1 takes its place"]
    run["actor-1-1"].runs(**{"rollout/tokens_total": 1.0})
    assert run.supervisor.poll().metrics["actors/alive"] == 2


def test_what_a_dead_actor_counted_stays_counted(run: Run) -> None:
    before = run.supervisor.poll().metrics["rollout/tokens_total"]
    run["actor-0"].ended = Ended(died=True)
    after = run.supervisor.poll().metrics["rollout/tokens_total"]
    assert (before, after) == (200, 200)


def test_an_actor_that_fails_is_replaced_and_its_traceback_is_kept(run: Run, tmp_path: Path) -> None:
    error = RuntimeError("out of memory\nmore")
    run["actor-0"].ended = Ended(error=error, trace="Traceback: here")
    run.supervisor.poll()
    assert run.said == ["actor-0 failed: RuntimeError: out of memory; actor-0-1 takes its place"]
    assert (tmp_path / "logs" / "actor-0.log").read_text() == "Traceback: here\n"


def test_an_actor_that_fails_before_it_ever_ran_ends_the_run(run: Run) -> None:
    run["actor-0"].report = Report(LOADING, 1, {}, [])
    run["actor-0"].ended = Ended(error=RuntimeError("bad weights"), trace="t")
    with pytest.raises(RunFailed, match=r"actor-0 failed: RuntimeError: bad weights.*actor-0\.log"):
        run.supervisor.poll()


def test_a_mistake_of_the_user_found_by_an_actor_keeps_its_words(run: Run) -> None:
    run["actor-0"].ended = Ended(error=UserError("llm.model: no"), trace="t")
    with pytest.raises(UserError, match=r"^llm\.model: no$"):
        run.supervisor.poll()


def test_more_restarts_than_allowed_end_the_run(config: RunConfig, tmp_path: Path) -> None:
    run = Run(config, tmp_path, max_actor_restarts=1)
    run["actor-0"].ended = Ended(died=True)
    run.supervisor.poll()
    run["actor-0-1"].ended = Ended(died=True)
    with pytest.raises(RunFailed, match=r"actor-0-1 died.*ray\.max_actor_restarts"):
        run.supervisor.poll()


def test_the_death_of_the_learner_ends_the_run_and_names_its_log(run: Run) -> None:
    run["learner"].ended = Ended(died=True)
    with pytest.raises(
        RunFailed, match=r"learner died; it was killed, or .*had not saved a checkpoint.*r\.log"
    ):
        run.supervisor.poll()


def test_the_death_of_the_learner_names_the_checkpoint_it_left(run: Run, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    run["learner"].ended = Ended(died=True)
    with pytest.raises(RunFailed, match=f"last checkpoint is in .*: `mara train --resume {tmp_path}`"):
        run.supervisor.poll()


def test_a_learner_that_was_stopped_before_it_began_saves_nothing(
    run: Run, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner of the run before goes on still: a signal ends the waiting for it."""
    monkeypatch.setattr("mara.deploy.learner_host.log_to", lambda path: None)
    host = LearnerHost(LearnerSpec("learner", config, "run", tmp_path, 32, {}))
    ended: list[BaseException] = []

    def waits() -> None:
        try:
            host.run()
        except StoppedEarly as error:
            ended.append(error)

    with hold_run(tmp_path / "logs"):
        thread = threading.Thread(target=waits)
        thread.start()
        host.stop()
        thread.join(20)
    assert len(ended) == 1
    run["learner"].ended = Ended(error=ended[0])
    with pytest.raises(StoppedEarly):
        run.supervisor.poll()


def test_the_end_of_the_learner_is_the_end_of_the_run(run: Run) -> None:
    assert run.supervisor.poll().summary is None
    run["learner"].ended = Ended(result=SUMMARY)
    assert run.supervisor.poll().summary == SUMMARY


def test_a_reward_model_that_ray_started_again_is_told_and_counted(config: RunConfig, tmp_path: Path) -> None:
    run = Run(config, tmp_path, num_rewards=2, max_actor_restarts=1)
    assert run.places.rollouts[0].reward_models == {"words": ["reward-words-0", "reward-words-1"]}
    assert run.supervisor.poll().metrics["rewards/restarted"] == 0
    run["reward-words-1"].num_restarts = 1
    for _ in range(2):
        assert run.supervisor.poll().metrics["rewards/restarted"] == 1
    assert run.said == ["reward-words-1 died and was started again; answers it was to score are dropped"]
    run["actor-0"].ended = Ended(died=True)
    run.supervisor.poll()
    assert run.places.rollouts[-1].reward_models == run.places.rollouts[0].reward_models
    run["reward-words-1"].num_restarts = 2
    with pytest.raises(RunFailed, match=r"reward-words-1 died 2 times.*ray\.max_actor_restarts"):
        run.supervisor.poll()
    run.supervisor.kill()
    assert run["reward-words-0"].killed


def test_a_reward_model_that_cannot_be_loaded_ends_the_run(config: RunConfig, tmp_path: Path) -> None:
    run = Run(config, tmp_path, num_rewards=1)
    run["reward-words-0"].ended = Ended(error=UserError("rewards.words.model: no"), trace="t")
    with pytest.raises(UserError, match=r"^rewards\.words\.model: no$"):
        run.supervisor.poll()
    run["reward-words-0"].ended = Ended(died=True)
    with pytest.raises(
        RunFailed, match=r"reward-words-0 died; the reward model could not be loaded; see .*log"
    ):
        run.supervisor.poll()
    run.supervisor.request_stop(learner=True)
    run.supervisor.poll()


def test_actors_that_end_after_a_stop_are_not_replaced(run: Run) -> None:
    run.supervisor.request_stop(learner=True)
    assert all(handle.stop_requested for handle in run.places.handles.values())
    run["actor-0"].ended = Ended()
    run["actor-1"].ended = Ended(died=True)
    assert run.supervisor.poll().metrics["actors/restarted"] == 0


def test_a_process_without_a_place_ends_the_run_after_the_time_allowed(
    config: RunConfig, tmp_path: Path
) -> None:
    run = Run(config, tmp_path, start_timeout_s=1e-9)
    run["actor-1"].report, run["actor-1"].heard = None, False
    with pytest.raises(RunFailed, match=r"actor-1 found no place.*2 CPU, 0 GPU"):
        run.supervisor.poll()


def test_a_silent_process_is_told_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mara.deploy.supervisor.SILENT_AFTER_S", -1.0)
    run["actor-0"].heard = False
    run.supervisor.poll()
    run.supervisor.poll()
    assert len(run.said) == 1
    assert run.said[0].startswith("actor-0 has not answered")


def test_counts_add_up_and_the_slowest_actor_is_shown() -> None:
    names = ("rollout/tokens_total", "rollout/idle_ratio", "rollout/policy_version", "weights/x_s")
    live = [dict(zip(names, values, strict=True)) for values in ((5, 0.2, 7, 1), (6, 0.4, 9, 3))]
    retired = [{"rollout/tokens_total": 10.0, "rollout/policy_version": 1.0}]
    merged = fleet_metrics(live, retired)
    assert merged["rollout/tokens_total"] == 21
    assert merged["rollout/idle_ratio"] == pytest.approx(0.3)
    assert merged["rollout/policy_version"] == 7
    assert merged["weights/x_s"] == 3
    assert fleet_metrics([{"replay/dropped": 1.0}, {}], [{"replay/dropped": 3.0}]) == {"replay/dropped": 4.0}


def test_rates_are_growth_over_the_window() -> None:
    rates = Rates(window_s=10)
    times = (0.0, 20.0, 24.0, 28.0, 30.0, 34.0, 60.0)
    rows = [rates.update({"n_total": max(0.0, 5 * (now - 19))}, ["n"], now_s=now) for now in times]
    assert rows[:4] == [{}] * 4  # ten seconds since the first of them have not passed
    assert rows[4:] == [{"n_per_s": 5.0}] * 3


@pytest.mark.parametrize(
    ("device", "actors", "each", "in_cluster", "expected"),
    [("cpu", 1, 0.0, 4, 0.0), ("auto", 2, 0.5, 4, 1.0), ("auto", 1, 0.5, 1, 0.5), ("auto", 1, 0.0, 0, 0.0)],
)
def test_the_learner_takes_what_the_actors_leave_of_the_gpus(
    config: RunConfig, device: str, actors: int, each: float, in_cluster: float, expected: float
) -> None:
    assert learner_gpus(placed(config, device, actors, each), in_cluster) == expected


def test_reward_models_come_before_the_learner_where_there_are_gpus(config: RunConfig) -> None:
    reward = FunctionRewardConfig(function="m:f", weight=1.0, replicas=2, num_gpus=0.25)
    config = config.model_copy(update={"rewards": {**config.rewards, "words": reward}})
    assert learner_gpus(placed(config, "auto", 1, 0.25), 1.0) == 0.25
    assert config.reward_cpus == 2.0
    with pytest.raises(UserError, match=r"reward models take 1\.25"):
        learner_gpus(placed(config, "cuda", 3, 0.25), 1.0)


def test_a_process_without_a_gpu_sees_none() -> None:
    hidden, given = (_environment(1, num_gpus)["env_vars"] for num_gpus in (0, 0.5))
    assert hidden["CUDA_VISIBLE_DEVICES"] == "" and "CUDA_VISIBLE_DEVICES" not in given


def test_processes_wait_for_their_threads_as_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # What the command sets is taken back after the test, too.
        monkeypatch.delenv(name)
    assert not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(_environment(2, 0)["env_vars"])
    monkeypatch.setattr("sys.argv", ["mara", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert _environment(2, 0)["env_vars"]["GOMP_SPINCOUNT"] == os.environ["GOMP_SPINCOUNT"]
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with pytest.raises(SystemExit):
        main()
    assert "GOMP_SPINCOUNT" not in os.environ
    assert _environment(2, 0)["env_vars"]["OMP_WAIT_POLICY"] == "active"


def test_a_learner_that_must_have_a_gpu_and_gets_none_is_a_mistake(config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"learner\.device=cuda.*rollout\.num_gpus"):
        learner_gpus(placed(config, "cuda", 2, 0.5), 1.0)


def placed(config: RunConfig, device: str, actors: int, each: float) -> RunConfig:
    rollout = config.rollout.model_copy(update={"num_actors": actors, "num_gpus": each})
    learner = config.learner.model_copy(update={"device": device})
    return config.model_copy(update={"rollout": rollout, "learner": learner})
