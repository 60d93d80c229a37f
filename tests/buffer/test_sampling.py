"""What is drawn from the ring, against plain references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mara.buffer.config import ReplayConfig, ShapingConfig
from mara.buffer.mirror import Mirror
from mara.buffer.sampling import PrioritisedSampling, RecencySampling, make_sampling
from mara.common.contracts import TransitionBatch
from mara.common.episode import Episode

MakeEpisode = Callable[..., Episode]
CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chi_square_is_plausible(drawn: torch.Tensor, probabilities: np.ndarray) -> bool:
    """Whether counts of outcomes 0, 1, … lie within five deviations of what the probabilities make of
    them."""
    expected = probabilities * len(drawn)
    assert expected.min() > 5, "the approximation needs more draws"
    counts = torch.bincount(drawn, minlength=len(probabilities)).numpy()
    assert len(counts) == len(probabilities), "something impossible was drawn"
    statistic = float(((counts - expected) ** 2 / expected).sum())
    degrees = len(probabilities) - 1
    return abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5


def make_mirror(capacity: int = 40, **replay: Any) -> Mirror:
    config = ReplayConfig(capacity_transitions=capacity, **replay)
    return Mirror(4, config, ShapingConfig(score_weights={"helpful": 1.0}))


def numbered(make_episode: MakeEpisode, number: int, first: int) -> Episode:
    """An episode whose decisions have the policy versions ``first``, ``first`` + 1, …: its place in
    history."""
    episode = make_episode(uid=str(number), seed=number, num_tokens=number % 7)
    versions_T = np.arange(first, first + episode.num_decisions, dtype=np.int64)
    return replace(episode, policy_versions_T=versions_T)


def test_a_uniform_batch_is_the_one_that_torch_draws_from_the_same_seed(make_episode: MakeEpisode) -> None:
    """What a seed gives is part of the promise: older runs can be repeated."""
    mirror, written = make_mirror(), 0
    for number in range(20):
        mirror.add([numbered(make_episode, number, written)])
        written = mirror.total_transitions
    tail = written - mirror.num_transitions
    assert tail > 0
    expected = torch.randint(mirror.num_transitions, (64,), generator=seeded(3)) + tail
    batch = mirror.sample(64, seeded(3))
    assert torch.equal(batch.policy_versions_B, expected)
    assert batch.weights_B is None


@pytest.mark.parametrize(("half_life", "size"), [(3.0, 20), (10.0, 12), (1e9, 15), (0.7, 6)])
def test_recent_transitions_are_drawn_by_their_age(half_life: float, size: int) -> None:
    sampling = RecencySampling(half_life, CPU)
    offsets = sampling.draw(1000, size, 200_000, seeded()).offsets_B
    by_age = 0.5 ** (np.arange(size) / half_life)
    probabilities = (by_age / by_age.sum())[::-1]
    assert chi_square_is_plausible(offsets, probabilities)


@pytest.mark.parametrize("half_life", [1e-9, 1e-3, 1e12])
@pytest.mark.parametrize("size", [1, 2, 1_000_000])
def test_extreme_half_lives_stay_within_the_ring(half_life: float, size: int) -> None:
    offsets = RecencySampling(half_life, CPU).draw(0, size, 10_000, seeded()).offsets_B
    assert int(offsets.min()) >= 0 and int(offsets.max()) < size
    if half_life < 1:
        assert (offsets == size - 1).all()


def test_a_draw_goes_by_the_error_and_its_weight_makes_up_for_it() -> None:
    capacity, exponent, correction = 100, 0.6, 0.7
    sampling = PrioritisedSampling(capacity, exponent, correction, CPU)
    sampling.written(0, capacity)
    errors = torch.rand(capacity, generator=seeded(5)) + 0.01
    sampling.learnt(torch.arange(capacity), -errors, tail=0)
    draw = sampling.draw(0, capacity, 400_000, seeded(1))
    powers = errors.double().numpy() ** exponent
    probabilities = powers / powers.sum()
    assert chi_square_is_plausible(draw.offsets_B, probabilities)
    assert draw.weights_B is not None
    raw = (capacity * probabilities[draw.offsets_B.numpy()]) ** -correction
    np.testing.assert_allclose(draw.weights_B.numpy(), raw / raw.max(), rtol=1e-4)


def test_an_exponent_of_zero_is_uniform_with_equal_weights() -> None:
    sampling = PrioritisedSampling(50, 0.0, 1.0, CPU)
    sampling.written(0, 50)
    sampling.learnt(torch.arange(50), torch.rand(50) * 100, tail=0)
    draw = sampling.draw(0, 50, 100_000, seeded())
    assert chi_square_is_plausible(draw.offsets_B, np.full(50, 1 / 50))
    assert draw.weights_B is not None and (draw.weights_B == 1).all()


def test_what_the_critic_has_not_seen_gets_the_largest_priority_so_far() -> None:
    sampling = PrioritisedSampling(64, 1.0, 0.4, CPU)
    sampling.written(0, 8)
    sampling.learnt(torch.arange(8), torch.tensor([0.5] * 7 + [9.0]), tail=0)
    sampling.learnt(torch.arange(8), torch.full((8,), 0.5), tail=0)
    sampling.written(8, 1)
    drawn = sampling.draw(0, 9, 100_000, seeded()).offsets_B
    assert chi_square_is_plausible(drawn, np.array([0.5] * 8 + [9.0]) / 13)


def test_a_transition_without_an_error_is_still_drawn_some_day() -> None:
    sampling = PrioritisedSampling(2, 0.1, 0.4, CPU)
    sampling.written(0, 2)
    sampling.learnt(torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), tail=0)
    assert set(sampling.draw(0, 2, 1000, seeded()).offsets_B.tolist()) == {0, 1}


class PlainPriorities:
    """The same as a dictionary from place to priority."""

    def __init__(self, exponent: float) -> None:
        self.exponent = exponent
        self.priorities: dict[int, float] = {}
        self.largest = 1.0

    def written(self, place: int, num: int) -> None:
        self.priorities |= dict.fromkeys(range(place, place + num), self.largest)

    def freed(self, place: int, num: int) -> None:
        for freed in range(place, place + num):
            del self.priorities[freed]

    def learnt(self, places: list[int], errors: list[float]) -> None:
        new = [(abs(error) + 1e-6) ** self.exponent for error in errors]
        self.largest = max(self.largest, *new)
        for place, priority in zip(places, new, strict=True):
            if place in self.priorities:
                self.priorities[place] = priority


@settings(deadline=None, max_examples=60)
@given(
    capacity=st.integers(2, 150),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=25),
    seed=st.integers(0, 2**31),
    before=st.integers(0, 3),
)
def test_priorities_follow_the_ring_through_every_wrap(
    capacity: int, sizes: list[int], seed: int, before: int
) -> None:
    """Episodes of these sizes come; batches are learnt from up to three episodes after they were drawn."""
    sampling, plain = PrioritisedSampling(capacity, 0.8, 0.5, CPU), PlainPriorities(0.8)
    generator = seeded(seed)
    held, tail, head = list[int](), 0, 0
    drawn: list[torch.Tensor] = []
    for size in (min(size, capacity) for size in sizes):
        while head - tail + size > capacity:
            freed = held.pop(0)
            for one in (sampling, plain):
                one.freed(tail, freed)
            tail += freed
        for one in (sampling, plain):
            one.written(head, size)
        held.append(size)
        head += size
        draw = sampling.draw(tail, head - tail, 50, generator)
        assert ((draw.offsets_B >= 0) & (draw.offsets_B < head - tail)).all()
        drawn.append(draw.offsets_B + tail)
        if len(drawn) > before:
            places = drawn.pop(0).unique()
            errors = torch.rand(len(places), generator=generator) * 3
            sampling.learnt(places, errors, tail)
            plain.learnt(places.tolist(), errors.tolist())
        by_slot = np.zeros(len(sampling._priorities), np.float32)
        for place, priority in plain.priorities.items():
            by_slot[place % capacity] = priority
        np.testing.assert_allclose(sampling._priorities.numpy(), by_slot, rtol=1e-5)
        blocks = by_slot.reshape(sampling._priorities_NS.shape).astype(np.float64).sum(axis=1)
        np.testing.assert_allclose(sampling._sums_N.numpy(), blocks, rtol=1e-5)


@pytest.mark.parametrize("sampling", ["uniform", "recency", "prioritised"])
def test_every_scheme_draws_only_what_the_ring_holds(make_episode: MakeEpisode, sampling: str) -> None:
    mirror = make_mirror(capacity=40, sampling=sampling, half_life_transitions=10)
    generator, batches = seeded(), list[TransitionBatch]()
    for number in range(60):
        mirror.add([numbered(make_episode, number, mirror.total_transitions)])
        if mirror.num_transitions == 0:
            continue
        batches.append(mirror.sample(100, generator))
        versions_B = batches[-1].policy_versions_B
        assert (versions_B < mirror.total_transitions).all()
        assert (versions_B >= mirror.total_transitions - mirror.num_transitions).all()
        assert torch.equal(versions_B, batches[-1].places_B)
        late = batches[max(0, len(batches) - 4)]  # some of it is gone by now
        mirror.learnt(late, torch.rand(100, generator=generator))
    assert mirror.total_transitions > 5 * 40


def test_an_error_learnt_too_late_does_not_fall_to_what_took_the_place(make_episode: MakeEpisode) -> None:
    mirror = make_mirror(capacity=12, sampling="prioritised", priority_exponent=1.0)
    mirror.add([make_episode(seed=1, num_tokens=5)])
    old = mirror.sample(64, seeded())
    while mirror.num_episodes != 1 or mirror.total_transitions == mirror.num_transitions:
        mirror.add([make_episode(seed=1, num_tokens=5)])
    mirror.learnt(old, torch.full((64,), 1e-3))
    batch = mirror.sample(64, seeded())
    assert batch.weights_B is not None and (batch.weights_B == 1).all()


def test_only_priorities_take_memory() -> None:
    sizes = {name: make_sampling(ReplayConfig(sampling=name), CPU) for name in ("uniform", "recency")}  # type: ignore[arg-type]
    assert {sampling.bytes_per_transition for sampling in sizes.values()} == {0}
    prioritised = PrioritisedSampling(10_000, 0.6, 0.4, CPU)
    taken = prioritised._priorities.nbytes + prioritised._sums_N.nbytes
    assert 10_000 * prioritised.bytes_per_transition <= taken < 10_000 * 4.5


def test_a_batch_moves_with_its_weights_or_without(make_episode: MakeEpisode) -> None:
    for sampling, has_weights in (("uniform", False), ("prioritised", True)):
        mirror = make_mirror(sampling=sampling)
        mirror.add([make_episode()])
        moved = mirror.sample(4, seeded()).to("meta")
        assert moved.states_BD.device.type == "meta"
        assert (moved.weights_B is not None) == has_weights


@pytest.mark.parametrize("sampling", ["uniform", "recency", "prioritised"])
def test_what_is_taken_back_after_a_restart_is_drawn_too(make_episode: MakeEpisode, sampling: str) -> None:
    mirror = make_mirror(capacity=200, sampling=sampling, half_life_transitions=1000)
    episodes, first = list[Episode](), 0
    for number in range(10):
        episodes.append(numbered(make_episode, number, first))
        first += episodes[-1].num_decisions
    mirror.add(episodes[5:])
    assert all(mirror.prepend(episode) for episode in reversed(episodes[:5]))
    batch = mirror.sample(5000, seeded())
    assert set(batch.policy_versions_B.tolist()) == set(range(first))
    mirror.learnt(batch, torch.rand(5000, generator=seeded(1)))
    assert set(mirror.sample(5000, seeded()).policy_versions_B.tolist()) <= set(range(first))
