"""The loop on an in-memory log: what it reads, when it trains, what it leaves behind."""

import contextlib
import itertools
import json
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open

from mara.buffer.background import BackgroundReader
from mara.buffer.config import ReplayConfig, ShapingConfig
from mara.buffer.memory import MemoryEpisodeLog, MemoryEpisodeReader, MemoryWeightChannel
from mara.common.agent import Agent, load_agent
from mara.common.config import AgentConfig
from mara.common.contracts import ReadCounts, TransitionBatch
from mara.common.critic import load_critic
from mara.common.episode import Episode
from mara.common.errors import ReplayUnavailable, UserError
from mara.learner import saving
from mara.learner.checkpoint import Checkpointed, read_checkpoint
from mara.learner.config import LearnerConfig, SACConfig
from mara.learner.loop import WAIT_S, Learner
from mara.learner.sac import SACMetrics

D = 12
AGENT = AgentConfig(widths=(8, 8))
SHAPING = ShapingConfig(score_weights={"good": 2.0})
EpisodeMaker = Callable[..., Episode]
SameState = Callable[[Any, Any], bool]


def make_learner(
    source: Any,
    weights: MemoryWeightChannel | None = None,
    *,
    shaping: ShapingConfig = SHAPING,
    **changes: Any,
) -> Learner:
    learner_keys = {key: changes.pop(key) for key in list(changes) if key in LearnerConfig.model_fields}
    config = LearnerConfig(
        **{
            "sac": SACConfig(critic_widths=(8, 8)),
            "batch_size": 8,
            "num_episodes": 10,
            "gradient_steps_per_episode": 2,
            "start_batches": 1,
            "publish_period_s": 0,
            "device": "cpu",
        }
        | learner_keys
    )
    replay = changes.pop("replay", ReplayConfig(capacity_transitions=1000))
    return Learner(
        config,
        AGENT,
        replay,
        shaping,
        hidden_size=D,
        source=source,
        weights=weights or MemoryWeightChannel(),
        **changes,
    )


def log_of(episodes: Sequence[Episode]) -> MemoryEpisodeLog:
    log = MemoryEpisodeLog()
    log.append(episodes)
    return log


class ScriptedReader:
    """Hands out prepared answers, one for each read, then nothing; notes how long it was allowed to wait."""

    counts = ReadCounts()
    waited_s = 0.0
    cursor = "0"

    def __init__(self, answers: Sequence[Sequence[Episode]]) -> None:
        self.answers = [list(answer) for answer in answers]
        self.timeouts: list[float] = []
        self.reads = 0

    def at_end(self) -> bool:
        return not self.answers

    def read_back(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        return []

    def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        self.timeouts.append(timeout_s)
        self.reads += 1
        return self.answers.pop(0) if self.answers else []


def test_every_episode_after_the_start_earns_its_gradient_steps(make_episode: EpisodeMaker) -> None:
    # 3 decisions an episode and a start at 8 transitions: the third episode is the first to earn.
    log = log_of([make_episode([1, 1, 1]) for _ in range(10)])
    summary = make_learner(log.reader()).run()
    assert (summary.gradient_steps, summary.num_episodes, summary.num_transitions) == (16, 10, 30)
    assert summary.num_tokens == 30
    assert summary.steps_dropped == 0
    assert not summary.stopped


def test_the_run_ends_at_num_episodes_even_if_the_log_holds_more(make_episode: EpisodeMaker) -> None:
    log = log_of([make_episode([1, 1, 1]) for _ in range(200)])
    reader = log.reader()
    assert make_learner(reader, num_episodes=70, gradient_steps_per_episode=0.1).run().num_episodes == 70
    assert reader.cursor == "70"


def test_weights_are_out_before_the_first_episode_is_asked_for(make_episode: EpisodeMaker) -> None:
    channel = MemoryWeightChannel()
    versions_at_read: list[int | None] = []

    class Reader(ScriptedReader):
        def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
            versions_at_read.append(channel.latest_version())
            return super().read(max_episodes, timeout_s)

    make_learner(Reader([[make_episode([1, 1, 1])] for _ in range(10)]), channel).run()
    assert versions_at_read[0] == 0


def test_the_last_agent_is_published_whatever_the_period(make_episode: EpisodeMaker) -> None:
    channel = MemoryWeightChannel()
    log = log_of([make_episode([1, 1, 1]) for _ in range(10)])
    learner = make_learner(log.reader(), channel, publish_period_s=3600)
    learner.run()
    latest = channel.fetch_newer(than=0)
    assert latest is not None
    assert latest.version == learner.gradient_step == 16
    for name, tensor in learner.sac.agent.state_dict().items():
        assert torch.equal(latest.tensors[name], tensor)


class RefusingChannel(MemoryWeightChannel):
    """Does not take the first publications, as one on a store that is away."""

    def __init__(self, num_refused: int) -> None:
        super().__init__()
        self.num_refused = num_refused
        self.num_asked = 0

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        self.num_asked += 1
        if self.num_refused > 0:
            self.num_refused -= 1
            return False
        return super().publish(version, tensors)


class PatientActors(ScriptedReader):
    """Make no episode before they have weights; a test that waits for them for ever fails instead."""

    def __init__(self, channel: MemoryWeightChannel, answers: Sequence[Sequence[Episode]]) -> None:
        super().__init__(answers)
        self.channel = channel

    def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        assert self.reads < 200
        if self.channel.latest_version() is None:
            self.reads += 1
            return []
        return super().read(max_episodes, timeout_s)


def test_a_first_publication_that_was_not_taken_is_made_again(make_episode: EpisodeMaker) -> None:
    channel = RefusingChannel(num_refused=3)
    actors = PatientActors(channel, [[make_episode([1] * 8)] for _ in range(2)])
    learner = make_learner(actors, channel, num_episodes=2)
    assert learner.run().num_episodes == 2
    assert channel.num_refused == 0


def test_a_publication_that_was_not_taken_is_made_again_when_the_next_one_is_due_and_no_earlier() -> None:
    channel = RefusingChannel(num_refused=2)

    class Reader(ScriptedReader):
        def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
            assert self.reads < 5000
            if channel.latest_version() is not None:
                learner.stop()
            time.sleep(0.001)
            return super().read(max_episodes, timeout_s)

    reader = Reader([])
    learner = make_learner(reader, channel, publish_period_s=0.1)
    began = time.monotonic()
    learner.run()
    assert time.monotonic() - began >= 0.2
    assert channel.num_asked == 3
    assert reader.reads > 2


class ForgettingChannel(MemoryWeightChannel):
    """Loses its weights once, as a store does that was restarted."""

    def forget(self) -> None:
        self._latest = None


def test_weights_that_the_store_has_lost_are_published_again_though_nothing_was_learnt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mara.learner.loop.LOOK_S", 0.02)
    channel = ForgettingChannel()

    class Reader(ScriptedReader):
        forgot = False

        def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
            assert self.reads < 5000
            if not self.forgot:
                assert channel.latest_version() == 0
                channel.forget()
                self.forgot = True
            elif channel.latest_version() == 0:
                learner.stop()
            time.sleep(0.001)
            return super().read(max_episodes, timeout_s)

    learner = make_learner(Reader([]), channel, publish_period_s=0.01)
    assert learner.run().gradient_steps == 0
    assert channel.latest_version() == 0


def test_it_waits_for_episodes_only_when_it_has_nothing_to_train_on(make_episode: EpisodeMaker) -> None:
    full = [make_episode([1] * 8) for _ in range(2)]
    reader = ScriptedReader([[full[0]], [], [], [full[1]], [], []])
    learner = make_learner(reader, num_episodes=2, gradient_steps_per_episode=2)
    assert learner.run().gradient_steps == 4
    # first read waits; one step is owed after the first of two; then it waits until the second episode came
    assert reader.timeouts[:4] == [WAIT_S, 0.0, WAIT_S, WAIT_S]


def test_a_learner_that_is_behind_drops_old_debts_and_says_so(make_episode: EpisodeMaker) -> None:
    log = log_of([make_episode([1] * 8) for _ in range(50)])
    learner = make_learner(
        log.reader(), num_episodes=50, max_backlog_episodes=5, gradient_steps_per_episode=2
    )
    summary = learner.run()
    assert summary.gradient_steps == 10
    assert summary.steps_dropped == 90


def test_in_a_finished_log_every_step_is_done_before_the_next_episode_is_taken_in(
    make_episode: EpisodeMaker,
) -> None:
    log, rows = log_of([make_episode([1] * 8) for _ in range(50)]), list[dict[str, float]]()
    steps_at_read: list[int] = []

    class Reader(MemoryEpisodeReader):
        def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
            steps_at_read.append(learner.gradient_step)
            return super().read(max_episodes, timeout_s)

    learner = make_learner(
        Reader(log), num_episodes=50, max_backlog_episodes=1, log_is_finished=True, on_metrics=rows.append
    )
    summary = learner.run()
    assert steps_at_read == [2 * n for n in range(50)]
    assert (summary.gradient_steps, summary.steps_dropped) == (100, 0)
    assert 0 < rows[-1]["replay/held_back_ratio"] <= 1


def test_a_finished_log_ends_the_run_when_its_steps_are_done(make_episode: EpisodeMaker) -> None:
    log = log_of([make_episode([1] * 8) for _ in range(7)])
    summary = make_learner(log.reader(), num_episodes=10**6, log_is_finished=True).run()
    assert (summary.num_episodes, summary.gradient_steps, summary.stopped) == (7, 14, False)


@pytest.mark.parametrize("sampling", ["uniform", "recency", "prioritised"])
def test_a_finished_log_gives_the_same_agent_whenever_its_episodes_arrive(
    make_episode: EpisodeMaker, same_state: SameState, sampling: Literal["uniform", "recency", "prioritised"]
) -> None:
    """Read directly, and in the background with pauses that differ."""
    log = log_of([make_episode([1, 0, 1, 1], scores={"good": float(n % 5)}) for n in range(30)])
    replay = ReplayConfig(capacity_transitions=60, sampling=sampling)

    class Slow(MemoryEpisodeReader):
        pauses = random.Random(0)

        def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
            time.sleep(self.pauses.uniform(0, 0.01))
            return super().read(max_episodes, timeout_s)

    states = []
    for _ in range(2):
        with BackgroundReader(Slow(log), log_is_finished=True) as source:
            learner = make_learner(source, num_episodes=100, replay=replay, log_is_finished=True)
            assert learner.run().gradient_steps == 58
        states.append(learner.state_dict())
    plain = make_learner(log.reader(), num_episodes=100, replay=replay, log_is_finished=True)
    plain.run()
    for state in states:
        assert state["cursor"] == plain.state_dict()["cursor"] == "30"
        assert same_state(state, plain.state_dict())


def test_where_actors_write_the_log_no_episode_is_held_back(make_episode: EpisodeMaker) -> None:
    rows: list[dict[str, float]] = []
    log = log_of([make_episode([1] * 8) for _ in range(10)])
    make_learner(log.reader(), on_metrics=rows.append).run()
    assert rows[-1]["replay/held_back_ratio"] == 0


@pytest.mark.parametrize("is_finished", [False, True])
def test_the_learner_waits_for_data_when_transitions_were_sampled_often_enough(
    make_episode: EpisodeMaker, is_finished: bool
) -> None:
    rows: list[dict[str, float]] = []
    log = log_of([make_episode([1, 0, 1]) for _ in range(40)])
    learner = make_learner(
        log.reader(),
        num_episodes=40,
        gradient_steps_per_episode=100,
        max_samples_per_transition=2.5,
        log_is_finished=is_finished,
        on_metrics=rows.append,
    )
    summary = learner.run()
    assert summary.gradient_steps == 37  # 120 transitions × 2.5 / batches of 8
    assert rows[-1]["replay/samples_per_insert"] == pytest.approx(37 * 8 / 120)
    assert summary.num_episodes == 40


def test_a_loaded_learner_remembers_how_often_transitions_were_sampled(make_episode: EpisodeMaker) -> None:
    episodes = [make_episode([1] * 8) for _ in range(10)]
    settings = {"max_samples_per_transition": 3, "gradient_steps_per_episode": 100}
    before = make_learner(log_of(episodes[:5]).reader(), num_episodes=5, **settings)
    assert before.run().gradient_steps == 15
    after = make_learner(log_of(episodes[5:]).reader(), num_episodes=10, **settings)
    after.load_state_dict(before.state_dict())
    assert after.run().gradient_steps == 30


def test_a_learner_that_nobody_sends_episodes_ends_with_one_line_and_keeps_what_it_learnt(
    make_episode: EpisodeMaker, tmp_path: Path
) -> None:
    reader = log_of([make_episode([1] * 8)]).reader()
    learner = make_learner(reader, data_timeout_s=0.2, run_folder=tmp_path)
    with pytest.raises(
        UserError, match=r"learner.data_timeout_s: no episode has come for 0.2 s; .*raise it$"
    ):
        learner.run()
    assert_saved(tmp_path, learner, gradient_steps=2)


def test_time_spent_training_does_not_count_as_waiting_for_data(
    make_episode: EpisodeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("mara.learner.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    reader = ScriptedReader([[make_episode([1] * 8)], *[[]] * 6, [make_episode([1] * 8)]])
    learner = make_learner(reader, num_episodes=2, gradient_steps_per_episode=7, data_timeout_s=0.2)
    update = learner.sac.update

    def takes_long(batch: TransitionBatch, *rest: Any) -> SACMetrics:
        now[0] += 0.05
        return update(batch, *rest)

    monkeypatch.setattr(learner.sac, "update", takes_long)
    assert learner.run().gradient_steps == 14


def test_answers_without_decisions_count_as_episodes(make_episode: EpisodeMaker) -> None:
    log = log_of([make_episode([1] * 8), make_episode([], num_tokens=5), make_episode([], num_tokens=5)])
    summary = make_learner(log.reader(), num_episodes=3).run()
    assert (summary.num_episodes, summary.gradient_steps, summary.num_tokens) == (3, 6, 18)


def test_too_few_transitions_to_begin_is_an_error_with_a_remedy(make_episode: EpisodeMaker) -> None:
    log = log_of([make_episode([1]) for _ in range(3)])
    with pytest.raises(UserError, match=r"start_batches.* at 80 transitions .*3 episodes held 3; lower it"):
        make_learner(log.reader(), num_episodes=3, start_batches=10).run()


def test_training_starts_though_whole_episodes_never_fill_the_ring_to_the_brim(
    make_episode: EpisodeMaker,
) -> None:
    log = log_of([make_episode([1, 1, 1]) for _ in range(50)])
    replay = ReplayConfig(capacity_transitions=100)
    learner = make_learner(log.reader(), num_episodes=50, batch_size=10, start_batches=10, replay=replay)
    summary = learner.run()
    assert learner.mirror.num_transitions == 99
    assert summary.gradient_steps == 2 * (50 - 33)  # the 34th episode brings the 100th transition


def test_fewer_episodes_than_a_deviation_takes_are_refused_at_once() -> None:
    running = ShapingConfig(score_weights={"good": 1.0}, normalise="running")
    reader = MemoryEpisodeLog().reader()
    with pytest.raises(
        UserError, match=r"learner\.num_episodes is 15, fewer than the 16 .*; raise it or use"
    ):
        make_learner(reader, num_episodes=15, shaping=running)
    make_learner(reader, num_episodes=16, shaping=running)


def test_a_start_beyond_the_capacity_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"8000 transitions .* replay.capacity_transitions 1000; lower it"):
        make_learner(MemoryEpisodeLog().reader(), start_batches=1000)


@pytest.mark.parametrize("device", ["cuda:77", "abacus"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(UserError, match=f"learner.device: '{device}' is not at hand"):
        make_learner(MemoryEpisodeLog().reader(), device=device)


def test_what_the_critic_gets_wrong_decides_what_is_drawn_next(make_episode: EpisodeMaker) -> None:
    log = log_of([make_episode([1, 0, 1], scores={"good": float(n)}) for n in range(10)])
    replay = ReplayConfig(capacity_transitions=1000, sampling="prioritised")
    learner = make_learner(log.reader(), replay=replay)
    learner.run()
    weights_B = learner.mirror.sample(200).weights_B
    assert weights_B is not None
    assert len(weights_B.unique()) > 10


def test_metrics_say_what_happened(make_episode: EpisodeMaker) -> None:
    rows: list[dict[str, float]] = []
    episodes = [make_episode([1, 0, 1], version=0, scores={"good": float(i)}) for i in range(10)]
    learner = make_learner(log_of(episodes).reader(), on_metrics=rows.append, log_period_s=3600)
    learner.run()
    (row,) = rows
    assert all(type(value) is float for value in row.values())
    expected = {
        "learner/gradient_step": 16,
        "episodes/total": 10,
        "tokens/total": 20,
        "replay/transitions": 30,
        "replay/samples_per_insert": 16 * 8 / 30,
        "replay/malformed": 0,
        "learner/steps_dropped": 0,
        "episode/reward": 9.0,
        "episode/score/good": 4.5,
        "episode/num_tokens": 2,
        "episode/accept_rate": 2 / 3,
        "episode/decisions_per_token": 1.5,
        "episode/accepted_rank_0": 1 / 2,
        "episode/finish_eos_rate": 1,
        "policy/lag_mean": 0,  # all were read before the first step
        "policy/lag_max": 0,
        "policy/sampled_lag_mean": 7.5,  # steps 0 … 15 on decisions of version 0
        "sac/target_entropy": learner.config.sac.target_entropy,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert {f"sac/{field.name}" for field in fields(SACMetrics)} <= row.keys()
    assert row["replay/sample_rate"] > row["replay/insert_rate"] > 0
    assert 0 <= row["learner/idle_ratio"] < 1
    assert row["replay/bytes"] == learner.mirror.nbytes > 30 * 2 * D


def test_what_got_lost_or_came_twice_is_in_the_metrics(make_episode: EpisodeMaker) -> None:
    rows: list[dict[str, float]] = []
    log = MemoryEpisodeLog(ReplayConfig(log_max_bytes=1 << 14))
    episodes = [make_episode([1] * 8, hidden_size=D) for _ in range(200)]
    log.append(episodes)
    log.append(episodes[-2:])
    make_learner(log.reader(), on_metrics=rows.append).run()
    assert rows[-1]["replay/duplicates"] == 2
    assert rows[-1]["replay/trimmed_unread"] > 100


def test_lag_is_the_gradient_step_at_reading_minus_the_version_that_decided(
    make_episode: EpisodeMaker,
) -> None:
    rows: list[dict[str, float]] = []
    late = make_episode([1, 1], policy_versions_T=torch.tensor([0, 1]).numpy())
    reader = ScriptedReader([[make_episode([1] * 8)], [], [late]])
    make_learner(reader, num_episodes=2, on_metrics=rows.append, log_period_s=3600).run()
    # two steps were done when the second episode was read: lags 2 and 1
    assert rows[0]["policy/lag_max"] == 2
    assert rows[0]["policy/lag_mean"] == pytest.approx((0 + 1.5) / 2)


def test_waiting_is_counted_as_idle() -> None:
    rows: list[dict[str, float]] = []

    def stop_at_the_first_row(row: dict[str, float]) -> None:
        rows.append(row)
        learner.stop()

    learner = make_learner(MemoryEpisodeLog().reader(), on_metrics=stop_at_the_first_row, log_period_s=1e-6)
    summary = learner.run()
    assert summary.stopped
    assert rows[0]["learner/idle_ratio"] > 0.9
    assert summary.idle_ratio > 0.9


def test_decoding_what_has_come_is_not_counted_as_idle(make_episode: EpisodeMaker) -> None:
    class SlowDecoder(ScriptedReader):
        def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
            time.sleep(0.02)
            return super().read(max_episodes, timeout_s)

    reader = SlowDecoder([[make_episode([1] * 8)] for _ in range(10)])
    assert make_learner(reader).run().idle_ratio == 0


class VanishingReader(ScriptedReader):
    """Raises once it has no more answers."""

    def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
        if not self.answers:
            raise ReplayUnavailable("the replay store has not answered for 60 s")
        return super().read(max_episodes, timeout_s)


def assert_saved(folder: Path, learner: Learner, gradient_steps: int) -> None:
    """The agent and a checkpoint lie there, as the learner holds them now."""
    agent, card = load_agent(folder / "agent", hidden_size=D)
    torch.testing.assert_close(agent.state_dict(), learner.sac.agent.state_dict(), rtol=0, atol=0)
    critic = load_critic(folder / "agent", hidden_size=D)
    torch.testing.assert_close(critic.state_dict(), learner.sac.critic.state_dict(), rtol=0, atol=0)
    assert all(tensor.isfinite().all() for tensor in agent.state_dict().values())
    assert card["training"]["gradient_steps"] == gradient_steps
    state = json.loads((folder / "checkpoints" / "latest" / "state.json").read_text())["state"]
    assert state["sac"]["step"] == learner.gradient_step == gradient_steps


def test_what_was_learnt_is_saved_when_the_store_goes_for_good(
    make_episode: EpisodeMaker, tmp_path: Path
) -> None:
    reader = VanishingReader([[make_episode([1] * 8)], [], []])
    learner = make_learner(reader, num_episodes=1000, run_folder=tmp_path)
    with pytest.raises(ReplayUnavailable, match="has not answered"):
        learner.run()
    assert_saved(tmp_path, learner, gradient_steps=2)


def with_nan(make_episode: EpisodeMaker) -> tuple[ShapingConfig, Episode]:
    """Shaping under which the episode's score reaches the critic's target."""
    monte_carlo = ShapingConfig(score_weights={"good": 1.0}, returns="monte_carlo")
    return monte_carlo, make_episode([1] * 8, scores={"good": math.nan})


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run_with_their_batch(
    make_episode: EpisodeMaker, tmp_path: Path
) -> None:
    shaping, bad = with_nan(make_episode)
    reader = ScriptedReader([[make_episode([1] * 8)], [], *([bad] for _ in range(9))])
    rows: list[dict[str, float]] = []
    learner = make_learner(
        reader,
        shaping=shaping,
        run_folder=tmp_path,
        max_skipped_steps=3,
        gradient_steps_per_episode=2,
        log_period_s=1e-6,
        on_metrics=rows.append,
    )
    with pytest.raises(FloatingPointError, match=r"last of 4 in a row .* the batch is in .*not-finite-batch"):
        learner.run()
    assert learner.gradient_step >= 2
    assert_saved(tmp_path, learner, gradient_steps=learner.gradient_step)  # the networks are sound
    assert rows[0]["learner/steps_skipped"] == 0
    assert rows[-1]["learner/steps_skipped"] == 3
    with safe_open(tmp_path / "not-finite-batch.safetensors", "pt") as file:
        assert file.metadata()["not_finite"] == "rewards_B"
        assert "critic_loss is nan" in file.metadata()["why"]
        assert file.get_tensor("rewards_B").isnan().any()
        assert file.get_tensor("states_BD").shape == (8, D)


def test_a_step_that_is_not_finite_now_and_then_does_not_end_the_run(make_episode: EpisodeMaker) -> None:
    learner = make_learner(log_of([make_episode([1] * 8) for _ in range(10)]).reader(), max_skipped_steps=1)
    update, tried = learner.sac.update, itertools.count()

    def breaks_every_third(batch: TransitionBatch, *rest: Any) -> SACMetrics:
        if next(tried) % 3 == 0:
            raise FloatingPointError("sac: critic_loss is nan at gradient step 0")
        return update(batch, *rest)

    learner.sac.update = breaks_every_third  # type: ignore[method-assign]
    assert learner.run().gradient_steps == 13  # of 20 earned, 7 were skipped


def test_a_batch_that_cannot_be_kept_does_not_hide_why_the_run_ends(
    make_episode: EpisodeMaker, tmp_path: Path
) -> None:
    (tmp_path / "not-finite-batch.safetensors").mkdir()
    shaping, bad = with_nan(make_episode)
    reader = ScriptedReader([[make_episode([1] * 8)], [], *([bad] for _ in range(9))])
    learner = make_learner(reader, shaping=shaping, run_folder=tmp_path, max_skipped_steps=1)
    with pytest.raises(FloatingPointError, match=r"last of 2 in a row .*; the batch could not be saved \("):
        learner.run()


def test_parameters_that_are_not_finite_are_not_saved_over_the_last_checkpoint(
    make_episode: EpisodeMaker, tmp_path: Path
) -> None:
    log = log_of([make_episode([1] * 8) for _ in range(4)])
    make_learner(log.reader(), num_episodes=4, run_folder=tmp_path).run()
    learner = make_learner(log.reader(), num_episodes=4, run_folder=tmp_path, checkpoint_period_s=1e-6)
    with torch.no_grad():
        learner.sac.critic.linear1.bias[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"critic\.linear1\.bias: not finite"):
        learner.run()
    state = read_checkpoint((tmp_path / "checkpoints" / "latest").resolve())
    assert state["sac"]["critic"]["linear1.bias"].isfinite().all()


def test_the_agent_is_saved_before_its_last_publication(make_episode: EpisodeMaker, tmp_path: Path) -> None:
    class Vanishing(MemoryWeightChannel):
        def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> bool:
            if version > 0:
                raise ReplayUnavailable("the replay store has not answered for 60 s")
            return super().publish(version, tensors)

    reader = ScriptedReader([[make_episode([1] * 8)] for _ in range(10)])
    learner = make_learner(reader, Vanishing(), run_folder=tmp_path, publish_period_s=3600)
    with pytest.raises(ReplayUnavailable):
        learner.run()
    assert_saved(tmp_path, learner, gradient_steps=20)


def test_a_run_that_fails_before_anything_was_learnt_leaves_no_agent(
    make_episode: EpisodeMaker, tmp_path: Path
) -> None:
    log = log_of([make_episode([1, 1], scores={"other": 1.0})])
    with pytest.raises(UserError, match="good"):
        make_learner(log.reader(), run_folder=tmp_path).run()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_to_save_does_not_hide_why_the_run_ended(
    make_episode: EpisodeMaker, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    reader = VanishingReader([[make_episode([1] * 8)], [], []])
    learner = make_learner(reader, num_episodes=1000, run_folder=tmp_path / "file")
    with pytest.raises(ReplayUnavailable) as caught:
        learner.run()
    assert "could not be saved either" in caught.value.__notes__[0]


def test_a_learner_that_owes_steps_waits_while_its_ring_is_empty(make_episode: EpisodeMaker) -> None:
    log = log_of([make_episode([1] * 8) for _ in range(5)])
    stopped = make_learner(log.reader(), num_episodes=6)
    stopped._read()
    assert stopped.state_dict()["limiter"]["owed"] == 10
    reader = ScriptedReader([[], [], [make_episode([1] * 8)]])
    loaded = make_learner(reader, num_episodes=6)
    loaded.load_state_dict(stopped.state_dict())
    assert loaded.run().gradient_steps == 12
    # The first read does not wait: there might be episodes from before.
    assert reader.timeouts == [0.0, WAIT_S, WAIT_S]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("capacity", [40, 1000])
@pytest.mark.parametrize("sampling", ["uniform", "prioritised"])
def test_a_run_on_a_finished_log_that_was_interrupted_gives_the_agent_of_one_that_was_not(
    make_episode: EpisodeMaker,
    same_state: SameState,
    sampling: Literal["uniform", "prioritised"],
    capacity: int,
    in_background: bool,
) -> None:
    log = log_of([make_episode([1, 0, 1, 1], scores={"good": float(n % 5)}) for n in range(30)])
    settings: dict[str, Any] = {
        "replay": ReplayConfig(capacity_transitions=capacity, sampling=sampling),
        # Each score is standardised by what had come until then.
        "shaping": ShapingConfig(score_weights={"good": 2.0}, normalise="running", baseline="prompt"),
        "log_is_finished": True,
    }
    whole = make_learner(log.reader(), num_episodes=30, **settings)
    whole.run()
    first = make_learner(log.reader(), num_episodes=21, **settings)
    first.run()
    source: Any = log.reader(first.state_dict()["cursor"])
    with contextlib.ExitStack() as exits:
        if in_background:
            source = exits.enter_context(BackgroundReader(source, log_is_finished=True))
        second = make_learner(source, num_episodes=30, seed=9, **settings)
        second.load_state_dict(first.state_dict())
        second.run()
    assert second.state_dict()["cursor"] == whole.state_dict()["cursor"] == "30"
    assert same_state(second.state_dict(), whole.state_dict())
    assert second.mirror.num_transitions == whole.mirror.num_transitions


def test_a_loaded_learner_trains_as_soon_as_enough_has_come_back(make_episode: EpisodeMaker) -> None:
    log = log_of([make_episode([1] * 8) for _ in range(200)])
    ring_at_step: list[int] = []

    class Trickle(MemoryEpisodeReader):
        def read_back(self, max_episodes: int, timeout_s: float) -> list[Episode]:
            return super().read_back(1, timeout_s)

    before = make_learner(log.reader(), num_episodes=100, start_batches=5)
    before._read()
    before._read()
    assert before.num_episodes == 100
    after = make_learner(Trickle(log, before.state_dict()["cursor"]), num_episodes=100, start_batches=5)
    after.load_state_dict(before.state_dict())
    update = after.sac.update

    def watched(batch: TransitionBatch, *rest: Any) -> SACMetrics:
        ring_at_step.append(after.mirror.num_transitions)
        return update(batch, *rest)

    after.sac.update = watched  # type: ignore[method-assign]
    after.run()
    assert ring_at_step[0] == 40  # as many as training starts with
    assert max(ring_at_step) == 800


def test_what_was_drawn_ahead_is_drawn_again_where_an_episode_comes_back(make_episode: EpisodeMaker) -> None:
    log = log_of([make_episode([1] * 4) for _ in range(12)])
    before = make_learner(log.reader(), num_episodes=12)
    before._read()

    class Trickle(MemoryEpisodeReader):
        def read_back(self, max_episodes: int, timeout_s: float) -> list[Episode] | None:
            return super().read_back(1, timeout_s)

    def trained(*, draws_ahead: bool) -> Learner:
        learner = make_learner(Trickle(log, before.state_dict()["cursor"]), num_episodes=12)
        learner.load_state_dict(before.state_dict())
        learner.draws_ahead = draws_ahead
        assert learner.run().gradient_steps == 22
        return learner

    one, other = trained(draws_ahead=False), trained(draws_ahead=True)
    assert one.mirror.num_transitions == 48
    for name, tensor in one.sac.agent.state_dict().items():
        assert torch.equal(other.sac.agent.state_dict()[name], tensor), name


def test_a_loaded_learner_whose_log_is_gone_waits_for_as_much_as_at_the_start(
    make_episode: EpisodeMaker,
) -> None:
    log = log_of([make_episode([1] * 8) for _ in range(6)])
    before = make_learner(log.reader(), num_episodes=6, start_batches=5)
    before.run()
    reader = ScriptedReader([[make_episode([1] * 8)] for _ in range(14)])
    after = make_learner(reader, num_episodes=20, start_batches=5)
    after.load_state_dict(before.state_dict())
    held: list[int] = []
    update = after.sac.update

    def watched(batch: TransitionBatch, *rest: Any) -> SACMetrics:
        held.append(after.mirror.num_transitions)
        return update(batch, *rest)

    after.sac.update = watched  # type: ignore[method-assign]
    summary = after.run()
    assert min(held) >= 40
    # Of the 14 the first, by which nothing was missed yet, and those from the fifth on earn two steps.
    assert (summary.num_episodes, summary.gradient_steps) == (20, before.gradient_step + 22)


def test_a_learner_with_nothing_to_train_on_and_nothing_to_come_ends(make_episode: EpisodeMaker) -> None:
    log = log_of([make_episode([1] * 8) for _ in range(5)])
    done = make_learner(log.reader(), num_episodes=5)
    done._read()
    loaded = make_learner(log.reader(), num_episodes=5)
    loaded.load_state_dict(done.state_dict())
    with pytest.raises(UserError, match=r"has lost .* go on with a higher number"):
        loaded.run()


def test_stop_from_another_thread_saves_publishes_and_returns(
    make_episode: EpisodeMaker, tmp_path: Path
) -> None:
    channel = MemoryWeightChannel()
    log = log_of([make_episode([1] * 8)])
    trained = threading.Event()
    learner = make_learner(
        log.reader(),
        channel,
        num_episodes=10**6,
        run_folder=tmp_path,
        log_period_s=1e-6,
        on_metrics=lambda row: trained.set() if row["learner/gradient_step"] >= 2 else None,
    )
    summaries = []
    thread = threading.Thread(target=lambda: summaries.append(learner.run()))
    thread.start()
    assert trained.wait(20)
    learner.stop()
    thread.join(20)
    assert not thread.is_alive()
    assert summaries[0].stopped
    assert summaries[0].gradient_steps == 2
    assert channel.latest_version() == 2
    assert (tmp_path / "checkpoints" / "latest" / "state.json").is_file()


def test_the_saved_agent_is_the_trained_one_with_its_card(make_episode: EpisodeMaker, tmp_path: Path) -> None:
    log = log_of([make_episode([1] * 8) for _ in range(4)])
    learner = make_learner(log.reader(), num_episodes=4, run_folder=tmp_path, agent_card={"llm": "tiny"})
    learner.run()
    agent, card = load_agent(tmp_path / "agent", hidden_size=D)
    torch.testing.assert_close(agent.state_dict(), learner.sac.agent.state_dict(), rtol=0, atol=0)
    critic = load_critic(tmp_path / "agent", hidden_size=D)
    torch.testing.assert_close(critic.state_dict(), learner.sac.critic.state_dict(), rtol=0, atol=0)
    assert card["llm"] == "tiny"
    expected = {"gradient_steps": 8, "policy_steps": 8, "episodes": 4, "complete": True}
    assert card["training"] == expected


@pytest.mark.parametrize(("critic_only_steps", "policy_steps"), [(5, 3), (8, 0), (20, 0)])
def test_the_card_counts_the_steps_in_which_the_agent_moved(
    make_episode: EpisodeMaker, tmp_path: Path, critic_only_steps: int, policy_steps: int
) -> None:
    log = log_of([make_episode([1] * 8) for _ in range(4)])
    sac = SACConfig(critic_widths=(8, 8), critic_only_steps=critic_only_steps)
    learner = make_learner(log.reader(), num_episodes=4, run_folder=tmp_path, sac=sac)
    start = {name: tensor.clone() for name, tensor in learner.sac.agent.state_dict().items()}
    assert learner.run().policy_steps == policy_steps
    agent, card = load_agent(tmp_path / "agent", hidden_size=D)
    assert (card["training"]["gradient_steps"], card["training"]["policy_steps"]) == (8, policy_steps)
    moved = any(not torch.equal(tensor, start[name]) for name, tensor in agent.state_dict().items())
    assert moved == (policy_steps > 0)


def test_checkpoints_are_written_on_the_way(make_episode: EpisodeMaker, tmp_path: Path) -> None:
    log = log_of([make_episode([1] * 8) for _ in range(4)])
    learner = make_learner(log.reader(), num_episodes=4, run_folder=tmp_path, checkpoint_period_s=1e-6)
    learner.run()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    # Of those between, the ones that came while another was being written are left out.
    assert len(kept) == 2 and kept[0] < kept[1] == "step-00000008-episode-00000004"
    state = json.loads((tmp_path / "checkpoints" / "latest" / "state.json").read_text())["state"]
    assert state["cursor"] == "4"
    assert state["sac"]["step"] == 8


def test_a_score_that_is_missing_ends_the_run_with_its_name(make_episode: EpisodeMaker) -> None:
    log = log_of([make_episode([1, 1], scores={"other": 1.0})])
    with pytest.raises(UserError, match="good"):
        make_learner(log.reader()).run()


def test_batches_drawn_ahead_are_those_that_would_have_been_drawn(make_episode: EpisodeMaker) -> None:
    episodes = [make_episode([1, 0, 1, 1]) for _ in range(8)]

    def trained(*, draws_ahead: bool) -> tuple[Learner, int]:
        # Episodes come while others are trained on: with one of them the ring is another one.
        learner = make_learner(
            ScriptedReader([[episode] for episode in episodes]), num_episodes=8, gradient_steps_per_episode=3
        )
        learner.draws_ahead = draws_ahead
        sample, num_drawn = learner.mirror.sample, 0

        def counted(*arguments: Any) -> TransitionBatch:
            nonlocal num_drawn
            num_drawn += 1
            return sample(*arguments)

        learner.mirror.sample = counted  # type: ignore[method-assign]
        assert learner.run().gradient_steps == 21
        return learner, num_drawn

    (one, drawn), (other, drawn_ahead) = trained(draws_ahead=False), trained(draws_ahead=True)
    assert drawn == 21 < drawn_ahead
    for name, tensor in one.sac.agent.state_dict().items():
        assert torch.equal(other.sac.agent.state_dict()[name], tensor), name
    sampling = [learner.state_dict()["sampling"] for learner in (one, other)]
    assert torch.equal(*sampling)  # A learner that goes on from here draws the same.


def test_the_same_log_and_seed_give_the_same_agent_bit_for_bit(make_episode: EpisodeMaker) -> None:
    log = log_of([make_episode([1, 0, 1]) for _ in range(10)])
    agents = []
    for seed in (1, 1, 2):
        learner = make_learner(log.reader(), seed=seed)
        learner.run()
        agents.append(learner.sac.agent.linear1.weight.detach())
    assert torch.equal(agents[0], agents[1])
    assert not torch.equal(agents[0], agents[2])


def test_training_goes_on_while_a_checkpoint_is_written_and_the_checkpoint_is_of_one_step(
    make_episode: EpisodeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, steps_then, gate = threading.Event(), list[int](), threading.Event()
    save = saving.save_checkpoint

    def slow_disk(folder: Path, learner: Checkpointed, num_kept: int) -> Path:
        if threading.current_thread() is not threading.main_thread():
            assert gate.wait(20)
        return save(folder, learner, num_kept)

    monkeypatch.setattr(saving, "save_checkpoint", slow_disk)
    states: dict[int, Any] = {}

    class Reader(ScriptedReader):
        def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
            step = learner.gradient_step
            states[step] = {name: t.clone() for name, t in learner.sac.critic.state_dict().items()}
            if step >= 6 and not gate.is_set():
                steps_then.append(step)
                gate.set()
            if gate.is_set() and (found := sorted((tmp_path / "checkpoints").glob("step-*"))):
                checked = read_checkpoint(found[0])
                expected = states[checked["sac"]["step"]]
                assert all(torch.equal(checked["sac"]["critic"][name], expected[name]) for name in expected)
                assert checked["sac"]["step"] < steps_then[0]
                written.set()
                learner.stop()
            time.sleep(0.01)
            return super().read(max_episodes, timeout_s)

    reader = Reader([[make_episode([1] * 8)] for _ in range(200)])
    learner = make_learner(reader, num_episodes=200, run_folder=tmp_path, checkpoint_period_s=1e-3)
    learner.run()
    assert written.is_set()


def test_what_is_saved_in_the_background_is_the_agent_as_it_was_when_that_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, gate = saving.save_agent, threading.Event()

    def slow_disk(agent: Agent, folder: Path, card: dict[str, Any]) -> None:
        assert gate.wait(20)
        save(agent, folder, card)

    monkeypatch.setattr(saving, "save_agent", slow_disk)
    learner = make_learner(ScriptedReader([]), run_folder=tmp_path)
    as_it_was = {name: tensor.clone() for name, tensor in learner.sac.agent.state_dict().items()}
    learner._save(wait=False)
    with torch.no_grad():  # the next gradient steps
        for parameter in learner.sac.agent.parameters():
            parameter.add_(1)
    gate.set()
    assert learner._saver is not None and learner._saver._writing is not None
    learner._saver._writing.result(20)
    saved = load_agent(tmp_path / "agent")[0].state_dict()
    (checkpoint,) = (tmp_path / "checkpoints").glob("step-*")
    checkpointed = read_checkpoint(checkpoint)["sac"]["agent"]
    for name, tensor in as_it_was.items():
        assert torch.equal(saved[name], tensor) and torch.equal(checkpointed[name], tensor), name


def test_a_disk_that_fails_in_the_background_ends_the_run(make_episode: EpisodeMaker, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")

    class Reader(ScriptedReader):
        def read(self, max_episodes: int, timeout_s: float) -> list[Episode]:
            assert self.reads < 1000
            time.sleep(0.01)
            return super().read(max_episodes, timeout_s)

    reader = Reader([[make_episode([1] * 8)]])
    learner = make_learner(reader, num_episodes=200, run_folder=tmp_path, checkpoint_period_s=1e-3)
    with pytest.raises(FileExistsError) as caught:
        learner.run()
    assert "could not be saved either" in caught.value.__notes__[0]


def test_the_last_save_waits_for_the_one_in_the_background_and_makes_up_for_its_failure(
    make_episode: EpisodeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, at_once, failures = saving.save_checkpoint, threading.Lock(), list[str]()

    def fails_in_the_background(folder: Path, learner: Checkpointed, num_kept: int) -> Path:
        assert at_once.acquire(blocking=False), "two at the same time"
        try:
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.3)
                failures.append("no space")
                raise OSError("no space left on device")
            return save(folder, learner, num_kept)
        finally:
            at_once.release()

    monkeypatch.setattr(saving, "save_checkpoint", fails_in_the_background)
    learner = make_learner(log_of([make_episode([1] * 8)]).reader(), num_episodes=1, run_folder=tmp_path)
    learner._save(wait=False)
    learner.run()
    assert failures == ["no space"]
    assert_saved(tmp_path, learner, gradient_steps=learner.gradient_step)
