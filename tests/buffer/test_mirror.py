"""The mirror against a list of transitions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import psutil
import pytest
import torch

from mara.buffer.config import ReplayConfig, ShapingConfig
from mara.buffer.mirror import Mirror
from mara.buffer.sampling import PrioritisedSampling
from mara.buffer.shaping import shape_episode
from mara.common.contracts import TransitionBatch
from mara.common.episode import Episode
from mara.common.errors import UserError

MakeEpisode = Callable[..., Episode]
SHAPING = ShapingConfig(score_weights={"helpful": 1.0}, discount=0.9, discount_per="accepted_token")
Transition = tuple[float | tuple[float, ...] | None, ...]


def make_mirror(capacity: int = 40, hidden_size: int = 4, shaping: ShapingConfig = SHAPING) -> Mirror:
    return Mirror(hidden_size, ReplayConfig(capacity_transitions=capacity), shaping)


def test_as_many_samples_are_kept_as_are_wanted(make_episode: MakeEpisode) -> None:
    mirror = make_mirror()
    mirror.num_batches_kept = 2
    mirror.add([make_episode(seed=number) for number in range(3)])
    first = mirror.sample(6, torch.Generator().manual_seed(0))
    seen = first.states_BD.clone(), first.next_states_BD.clone()
    mirror.sample(6, torch.Generator().manual_seed(1))
    assert torch.equal(first.states_BD, seen[0]) and torch.equal(first.next_states_BD, seen[1])
    mirror.sample(6, torch.Generator().manual_seed(2))
    assert not torch.equal(first.states_BD, seen[0])


def transitions_of(episode: Episode) -> list[Transition]:
    """Every (s, a, r, γ, forced, log-probability, version, s', forced') of an episode, one by one."""
    shaped = shape_episode(episode, SHAPING, episode.scores["helpful"])
    transitions: list[Transition] = []
    for t in range(episode.num_decisions):
        last = t == episode.num_decisions - 1
        logprobs_T = episode.accept_logprobs_T if episode.actions_T[t] else episode.reject_logprobs_T
        transitions.append(
            (
                tuple(episode.states_TD[t].tolist()),
                float(episode.actions_T[t]),
                float(shaped.rewards_T[t]),
                float(shaped.discounts_T[t]),
                float(episode.forced_T[t]),
                0.0 if episode.forced_T[t] else float(logprobs_T[t]),
                float(episode.policy_versions_T[t]),
                None if last else tuple(episode.states_TD[t + 1].tolist()),
                None if last else float(episode.forced_T[t + 1]),
            )
        )
    return transitions


def rows_of(batch: TransitionBatch) -> list[Transition]:
    rows: list[Transition] = []
    for b in range(len(batch)):
        last = batch.discounts_B[b] == 0
        rows.append(
            (
                tuple(batch.states_BD[b].tolist()),
                float(batch.actions_B[b]),
                float(batch.rewards_B[b]),
                float(batch.discounts_B[b]),
                float(batch.forced_B[b]),
                float(batch.behaviour_logprobs_B[b]),
                float(batch.policy_versions_B[b]),
                None if last else tuple(batch.next_states_BD[b].tolist()),
                None if last else float(batch.next_forced_B[b]),
            )
        )
    return rows


def held_by_the_book(episodes: list[Episode], capacity: int) -> list[Episode]:
    """The most of the newest episodes that fit."""
    held: list[Episode] = []
    for episode in reversed(episodes):
        if sum(e.num_decisions for e in held) + episode.num_decisions > capacity:
            break
        held.insert(0, episode)
    return [e for e in held if e.num_decisions > 0]


def test_samples_are_always_transitions_of_held_episodes_through_many_wraps(
    make_episode: MakeEpisode,
) -> None:
    mirror, generator = make_mirror(capacity=40), torch.Generator().manual_seed(0)
    episodes: list[Episode] = []
    for number in range(60):
        episodes.append(make_episode(uid=str(number), seed=number, num_tokens=number % 7))
        mirror.add(episodes[-1:])
        held = held_by_the_book(episodes, 40)
        possible = {transition for episode in held for transition in transitions_of(episode)}
        assert mirror.num_transitions == len(possible)
        assert mirror.num_episodes == len(held)
        if possible:
            rows = rows_of(mirror.sample(200, generator))
            assert set(rows) <= possible
            if number % 10 == 9:
                assert set(rows_of(mirror.sample(2000, generator))) == possible
    assert mirror.total_transitions == sum(e.num_decisions for e in episodes) > 5 * 40
    assert mirror.total_episodes == 60
    assert mirror.num_without_decisions == sum(e.num_decisions == 0 for e in episodes) > 0


def test_sampling_is_uniform(make_episode: MakeEpisode) -> None:
    mirror = make_mirror(capacity=60)
    for number in range(30):
        mirror.add([make_episode(uid=str(number), seed=number)])
    batch = mirror.sample(50_000, torch.Generator().manual_seed(1))
    _, counts = torch.unique(batch.states_BD.float(), dim=0, return_counts=True)
    assert len(counts) == mirror.num_transitions
    expected = 50_000 / mirror.num_transitions
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    degrees = len(counts) - 1
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def test_the_same_seed_samples_the_same_batch(make_episode: MakeEpisode) -> None:
    mirror = make_mirror()
    mirror.add([make_episode(seed=number) for number in range(3)])
    one = rows_of(mirror.sample(32, torch.Generator().manual_seed(7)))
    two = rows_of(mirror.sample(32, torch.Generator().manual_seed(7)))
    other = rows_of(mirror.sample(32, torch.Generator().manual_seed(8)))
    assert one == two != other


def test_next_states_are_finite_even_where_they_count_for_nothing(make_episode: MakeEpisode) -> None:
    mirror = make_mirror(capacity=1000)
    episode = make_episode(seed=2)
    mirror.add([episode])
    batch = mirror.sample(500, torch.Generator().manual_seed(0))
    ends = batch.discounts_B == 0
    assert ends.any()
    assert torch.equal(batch.next_states_BD[ends], batch.states_BD[ends])


def test_batches_have_the_dtypes_of_the_contract(make_episode: MakeEpisode) -> None:
    mirror = Mirror(4, ReplayConfig(capacity_transitions=40, sampling="prioritised"), SHAPING)
    mirror.add([make_episode(dtype=torch.float16)])
    batch = mirror.sample(3)
    dtypes = {name: getattr(batch, name).dtype for name in TransitionBatch.__slots__}
    assert dtypes == {
        "states_BD": torch.float16,
        "next_states_BD": torch.float16,
        "actions_B": torch.int64,
        "rewards_B": torch.float32,
        "discounts_B": torch.float32,
        "forced_B": torch.bool,
        "next_forced_B": torch.bool,
        "behaviour_logprobs_B": torch.float32,
        "policy_versions_B": torch.int64,
        "places_B": torch.int64,
        "weights_B": torch.float32,
    }


def test_the_mirror_normalises_and_remembers_across_a_restart(make_episode: MakeEpisode) -> None:
    shaping = ShapingConfig(
        score_weights={"helpful": 1.0}, normalise="running", baseline="prompt", kl_estimator="none"
    )
    episodes = [make_episode(seed=seed, prompt_id=str(seed % 2)) for seed in range(24)]
    uninterrupted, before, after = (make_mirror(1000, shaping=shaping) for _ in range(3))
    uninterrupted.add(episodes)
    before.add(episodes[:20])
    after.load_state_dict(before.state_dict())
    after.add(episodes[20:])
    total = uninterrupted.mean_score * 24
    assert before.mean_score * 20 + after.mean_score * 4 == pytest.approx(total, abs=1e-9)
    assert after.total_transitions == uninterrupted.total_transitions
    assert after.total_episodes == 24
    assert after.num_episodes == 4
    assert any(abs(score) > 0.1 for score in (total, before.mean_score))


RUNNING = ShapingConfig(score_weights={"helpful": 1.0}, normalise="running", terminal="progress")


@pytest.mark.parametrize("difference", [0.0, 1e-5, 0.002, 0.02, 0.1, 1.0])
def test_no_reward_is_large_however_alike_the_first_scores_are(
    make_episode: MakeEpisode, difference: float
) -> None:
    """The first words of an answer score -2, far from whole answers, which two alike tell nothing about."""
    mirror = make_mirror(1000, shaping=RUNNING)
    rng = np.random.default_rng(0)
    for number in range(40):
        score = [0.3, 0.3 + difference][number] if number < 2 else float(rng.normal())
        episode = make_episode(uid=str(number), seed=number, scores={"helpful": score})
        prefix_scores = {"helpful": np.linspace(-2, score, episode.num_tokens, dtype=np.float32)}
        mirror.add([replace(episode, prefix_scores=prefix_scores)])
    rewards_B = mirror.sample(5000, torch.Generator().manual_seed(0)).rewards_B
    assert rewards_B.abs().max().item() < 4


def test_the_first_episodes_wait_for_a_deviation_and_are_written_in_order(make_episode: MakeEpisode) -> None:
    mirror = make_mirror(1000, shaping=RUNNING)
    episodes = [make_episode(uid=str(seed), seed=seed, num_tokens=seed % 5) for seed in range(18)]
    for number, episode in enumerate(episodes, start=1):
        mirror.add([episode])
        written = episodes[:number] if number >= 16 else []
        num_transitions = sum(e.num_decisions for e in written)
        assert mirror.num_transitions == mirror.total_transitions == num_transitions
        assert mirror.num_episodes == sum(e.num_decisions > 0 for e in written)
        assert mirror.total_episodes == number
        assert mirror.num_without_decisions == sum(e.num_decisions == 0 for e in episodes[:number])
    states = torch.cat([episode.states_TD for episode in episodes])
    assert mirror._states_CD is not None
    assert torch.equal(mirror._states_CD[: len(states)], states)


def test_raw_scores_wait_for_nothing(make_episode: MakeEpisode) -> None:
    mirror = make_mirror()
    mirror.add([make_episode()])
    assert mirror.num_transitions > 0


def test_what_waited_while_the_state_was_saved_is_counted_and_gone(make_episode: MakeEpisode) -> None:
    episodes = [make_episode(uid=str(seed), seed=seed) for seed in range(16)]
    before, after = make_mirror(1000, shaping=RUNNING), make_mirror(1000, shaping=RUNNING)
    before.add(episodes[:10])
    after.load_state_dict(before.state_dict())
    after.add(episodes[10:])
    assert after.num_transitions == sum(episode.num_decisions for episode in episodes[10:])
    assert after.total_episodes == 16
    before.add(episodes[10:])
    assert before.state_dict()["normaliser"] == after.state_dict()["normaliser"]


def test_an_episode_of_another_dtype_is_refused_while_the_first_ones_wait(make_episode: MakeEpisode) -> None:
    mirror = make_mirror(shaping=RUNNING)
    mirror.add([make_episode()])
    with pytest.raises(UserError, match=r"float16.*bfloat16.*llm\.dtype"):
        mirror.add([make_episode(dtype=torch.float16)])


def test_an_answer_without_decisions_has_no_dtype_to_complain_about(make_episode: MakeEpisode) -> None:
    mirror = make_mirror()
    mirror.add([make_episode(num_tokens=0), make_episode(dtype=torch.float16), make_episode(num_tokens=0)])
    assert mirror.sample(3).states_BD.dtype == torch.float16


def test_states_that_are_converted_while_they_are_gathered_are_those_that_are_stored(
    make_episode: MakeEpisode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mara.buffer.mirror._PART_BYTES", 7 * 2 * 4)  # seven rows a part
    mirror = make_mirror()
    mirror.add([make_episode(seed=number) for number in range(3)])
    for size in (3, 7, 30):
        stored, converted = (
            mirror.sample(size, torch.Generator().manual_seed(5), dtype) for dtype in (None, torch.float32)
        )
        assert stored.states_BD.dtype == torch.bfloat16
        assert torch.equal(converted.states_BD, stored.states_BD.float())
        assert torch.equal(converted.next_states_BD, stored.next_states_BD.float())
        assert not torch.equal(stored.states_BD, stored.next_states_BD)
        again = mirror.sample(size, states_dtype=torch.float32)
        assert again.states_BD.data_ptr() == converted.states_BD.data_ptr(), "fresh memory for every batch"


@pytest.mark.parametrize("sampling", ["uniform", "recency", "prioritised"])
def test_memory_per_transition_is_two_bytes_per_dimension_and_a_little(
    make_episode: MakeEpisode, sampling: Literal["uniform", "recency", "prioritised"]
) -> None:
    """As counted, as allocated, and as the operating system sees it: 2 d + 32 bytes within 5 %."""
    capacity, hidden_size = 6000, 4096
    replay = ReplayConfig(capacity_transitions=capacity, sampling=sampling)
    episode = make_episode(num_tokens=100, hidden_size=hidden_size)
    process = psutil.Process()
    # What other tests have freed would be used again, and nothing would be seen to grow.
    ctypes.CDLL(None).malloc_trim(0)
    before = process.memory_info().rss
    mirror = Mirror(hidden_size, replay, SHAPING)
    while mirror.total_transitions < capacity:
        mirror.add([episode])
    resident = process.memory_info().rss - before
    expected = capacity * (2 * hidden_size + 32)
    rings = [*mirror._columns(), mirror._states_CD]
    if isinstance(mirror._sampling, PrioritisedSampling):
        rings += [mirror._sampling._priorities, mirror._sampling._sums_N]
    allocated = sum(ring.untyped_storage().nbytes() for ring in rings if ring is not None)
    assert mirror.num_transitions > 0.95 * capacity
    assert mirror.nbytes / mirror.num_transitions == pytest.approx(expected / capacity, rel=0.05)
    assert allocated == pytest.approx(expected, rel=0.05)
    assert resident == pytest.approx(expected, rel=0.05)


def test_an_empty_mirror_cannot_be_sampled(make_episode: MakeEpisode) -> None:
    mirror = make_mirror()
    mirror.add([make_episode(num_tokens=0)])
    with pytest.raises(ValueError, match="empty"):
        mirror.sample(4)


def test_episodes_of_another_llm_are_refused(make_episode: MakeEpisode) -> None:
    mirror = make_mirror(hidden_size=8)
    with pytest.raises(UserError, match=r"hidden size 4.*has 8"):
        mirror.add([make_episode(hidden_size=4)])
    mirror.add([make_episode(hidden_size=8)])
    with pytest.raises(UserError, match=r"float16.*bfloat16.*llm\.dtype"):
        mirror.add([make_episode(hidden_size=8, dtype=torch.float16)])


def test_an_episode_larger_than_the_ring_names_the_setting(make_episode: MakeEpisode) -> None:
    with pytest.raises(UserError, match=r"replay\.capacity_transitions is 3"):
        make_mirror(capacity=3).add([make_episode(num_tokens=20)])


def test_read_only_arrays_and_foreign_memory_are_copied(make_episode: MakeEpisode) -> None:
    episode = make_episode(seed=4)
    frozen = replace(episode, actions_T=np.frombuffer(episode.actions_T.tobytes(), np.uint8))
    mirror = make_mirror()
    mirror.add([frozen])
    kept = set(rows_of(mirror.sample(300, torch.Generator().manual_seed(0))))
    frozen.states_TD.zero_()
    assert set(rows_of(mirror.sample(300, torch.Generator().manual_seed(0)))) == kept


def in_order(mirror: Mirror) -> list[Transition]:
    """Every transition held, oldest first."""
    slots = (mirror._tail + torch.arange(mirror.num_transitions)) % mirror._capacity
    columns = [mirror._actions_C, mirror._rewards_C, mirror._discounts_C, mirror._behaviour_logprobs_C]
    assert mirror._states_CD is not None
    states = [tuple(state.tolist()) for state in mirror._states_CD[slots]]
    return list(zip(states, *(column[slots].tolist() for column in columns), strict=True))


@pytest.mark.parametrize("capacity", [30, 61, 1000])
@pytest.mark.parametrize("num_new", [0, 1, 7, 20])
def test_a_ring_filled_backwards_is_the_one_filled_forwards(
    make_episode: MakeEpisode, capacity: int, num_new: int
) -> None:
    """20 episodes came before a restart; new ones arrive between those that are taken back."""
    episodes = [make_episode(uid=str(n), seed=n, num_tokens=n % 6) for n in range(20 + num_new)]
    forwards, before, backwards = (make_mirror(capacity) for _ in range(3))
    forwards.add(episodes)
    before.add(episodes[:20])
    backwards.load_state_dict(before.state_dict())
    new = iter(episodes[20:])
    for older in reversed(episodes[:20]):
        if (arrived := next(new, None)) is not None:
            backwards.add([arrived])
        if not backwards.prepend(older):
            break
    backwards.add(list(new))
    assert in_order(backwards) == in_order(forwards)
    assert backwards.state_dict() == forwards.state_dict()
    assert backwards.num_episodes == forwards.num_episodes
    assert backwards.mean_score == pytest.approx(forwards.mean_score)


def test_a_ring_that_has_let_go_of_an_episode_takes_no_older_one(make_episode: MakeEpisode) -> None:
    mirror = make_mirror(capacity=30)
    mirror.add([make_episode(seed=n, num_tokens=8) for n in range(6)])
    assert mirror.total_transitions > 30
    small = make_episode(seed=1, num_tokens=1)
    assert small.num_decisions <= 30 - mirror.num_transitions
    before = in_order(mirror)
    assert not mirror.prepend(small)
    assert in_order(mirror) == before


def test_what_is_taken_back_is_scored_by_the_saved_means_and_counted_nowhere(
    make_episode: MakeEpisode,
) -> None:
    shaping = ShapingConfig(score_weights={"helpful": 1.0}, normalise="running", baseline="prompt")
    episodes = [make_episode(uid=str(n), seed=n, prompt_id=str(n % 2)) for n in range(24)]
    before, after = make_mirror(1000, shaping=shaping), make_mirror(1000, shaping=shaping)
    before.add(episodes)
    after.load_state_dict(before.state_dict())
    assert all(after.prepend(episode) for episode in reversed(episodes))
    assert after.state_dict() == before.state_dict()
    assert after.num_transitions == before.num_transitions
    expected = [before._normaliser.score(episode, remember=False) for episode in episodes]
    assert after.mean_score == pytest.approx(np.mean(expected))
    assert after.mean_score != pytest.approx(before.mean_score)


def test_what_was_held_back_at_the_restart_is_held_back_again(make_episode: MakeEpisode) -> None:
    episodes = [make_episode(uid=str(seed), seed=seed) for seed in range(20)]
    uninterrupted, before, after = (make_mirror(1000, shaping=RUNNING) for _ in range(3))
    uninterrupted.add(episodes)
    before.add(episodes[:10])
    after.load_state_dict(before.state_dict())
    assert all(after.prepend(episode) for episode in reversed(episodes[:10]))
    assert after.num_transitions == 0
    after.add(episodes[10:])
    assert in_order(after) == in_order(uninterrupted)
    assert after.state_dict() == uninterrupted.state_dict()


@pytest.mark.parametrize("sampling", ["uniform", "prioritised"])
def test_a_ring_filled_again_has_the_rewards_and_priorities_it_had(
    make_episode: MakeEpisode, sampling: str
) -> None:
    """Both are made of what had come by then, so that the log alone could not give them back."""
    shaping = ShapingConfig(score_weights={"helpful": 1.0}, normalise="running", baseline="prompt")
    episodes = [make_episode(uid=str(n), seed=n, prompt_id=str(n % 2), num_tokens=n % 6) for n in range(40)]
    replay = ReplayConfig.model_validate({"capacity_transitions": 61, "sampling": sampling})
    before, after = (Mirror(4, replay, shaping) for _ in range(2))
    before.add(episodes)
    assert before.num_transitions < before.total_transitions  # some had to make room
    batch = before.sample(16, torch.Generator().manual_seed(0))
    before.learnt(batch, torch.linspace(0.1, 3, 16))
    after.load_state_dict(before.state_dict())
    after.load_ring_state(before.ring_state())
    for episode in reversed(episodes):
        if not after.prepend(episode):
            break
    late = make_episode(uid="late", seed=99)
    for mirror in (before, after):
        mirror.add([late])
    assert in_order(after) == in_order(before)
    assert after.mean_score == before.mean_score
    states = [mirror.ring_state() for mirror in (before, after)]
    for name in ("rewards", "sampling", "scores", "num_decisions"):
        torch.testing.assert_close(*(state.pop(name) for state in states), rtol=0, atol=0)
    assert states[0] == states[1]
    draws = [mirror.sample(64, torch.Generator().manual_seed(1)) for mirror in (before, after)]
    assert torch.equal(draws[0].places_B, draws[1].places_B)
    if sampling == "prioritised":
        assert torch.equal(draws[0].weights_B, draws[1].weights_B)


@pytest.mark.parametrize("returns", ["bootstrapped", "monte_carlo"])
def test_no_return_exceeds_the_largest_one(make_episode: MakeEpisode, returns: str) -> None:
    shaping = ShapingConfig(score_weights={"helpful": 1.0}, kl_estimator="none", returns=returns)
    mirror = make_mirror(1000, shaping=shaping)
    assert mirror.largest_return == 0
    mirror.add([make_episode(seed=n, num_tokens=4, scores={"helpful": s}) for n, s in enumerate((1, -3, 2))])
    assert mirror.largest_return == 3
