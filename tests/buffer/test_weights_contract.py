"""What every weight channel promises, held against the one in memory and the one on Redis."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mara.buffer.connection import connect
from mara.buffer.memory import MemoryWeightChannel
from mara.buffer.shared_weights import SharedWeights
from mara.buffer.weights import RedisWeightChannel
from mara.common.agent import Agent, agent_digest, why_unfit
from mara.common.config import AgentConfig
from mara.common.contracts import VersionedWeights
from mara.common.errors import DamagedWeights

DIGEST = agent_digest(16, AgentConfig(widths=(8, 4)))


class SharedEnd(RedisWeightChannel):
    """Publishes as ever, and fetches through the files of this machine."""

    def __init__(self, url: str, run_id: str, parent: Path) -> None:
        super().__init__(connect(url), run_id, agent_digest=DIGEST)
        self._shared = SharedWeights(RedisWeightChannel(connect(url), run_id), run_id, parent)

    def fetch_newer(self, than: int, skip: int | None = None) -> VersionedWeights | None:
        return self._shared.fetch_newer(than, skip)


@pytest.fixture(params=["memory", "redis", "shared"])
def make_end(request: pytest.FixtureRequest, run_id: str, tmp_path: Path) -> Callable[[], Any]:
    """Makes another end of the same channel."""
    if request.param == "memory":
        channel = MemoryWeightChannel(DIGEST)
        return lambda: channel
    url = request.getfixturevalue("server").url
    if request.param == "shared":
        return lambda: SharedEnd(url, run_id, tmp_path / "shared")
    return lambda: RedisWeightChannel(connect(url), run_id, agent_digest=DIGEST)


def test_nothing_is_newer_before_the_first_publication(make_end: Callable[[], Any]) -> None:
    assert make_end().fetch_newer(than=-1) is None
    assert make_end().latest_version() is None


def test_an_agent_arrives_as_it_was_published(make_end: Callable[[], Any]) -> None:
    agent = Agent(16, AgentConfig(widths=(8, 4)))
    before = time.time()
    make_end().publish(0, agent.state_dict())
    weights = make_end().fetch_newer(than=-1)
    assert weights.version == 0
    assert why_unfit(agent, weights) is None
    assert before <= weights.published_at_s <= time.time()
    copy = Agent(16, AgentConfig(widths=(8, 4)))
    copy.load_state_dict(weights.tensors, strict=True)
    states = torch.randn(5, 16)
    assert torch.equal(copy(states), agent(states))


def test_only_newer_weights_are_fetched_and_the_latest_wins(make_end: Callable[[], Any]) -> None:
    sink, source = make_end(), make_end()
    for version in (1, 5, 9):
        assert sink.publish(version, {"w": torch.tensor([float(version)])}) is True
    assert sink.latest_version() == source.latest_version() == 9
    assert source.fetch_newer(than=1).tensors["w"].item() == 9
    assert source.fetch_newer(than=8).version == 9
    assert source.fetch_newer(than=9) is None
    assert source.fetch_newer(than=1, skip=9) is None
    assert source.fetch_newer(than=1, skip=5).version == 9


def test_a_sink_knows_what_is_held(make_end: Callable[[], Any]) -> None:
    sink = make_end()
    assert not sink.holds(0)
    sink.publish(4, {"w": torch.zeros(1)})
    assert sink.holds(4) and sink.holds(3) and not sink.holds(5)


@pytest.mark.parametrize("version", [7, 6, -1])
def test_a_version_that_does_not_grow_is_refused(make_end: Callable[[], Any], version: int) -> None:
    make_end().publish(7, {"w": torch.tensor([7.0])})
    with pytest.raises(ValueError, match=rf"version {version} is not above the published 7"):
        make_end().publish(version, {"w": torch.tensor([0.0])})
    assert make_end().fetch_newer(than=0).tensors["w"].item() == 7


def test_published_weights_do_not_change_with_the_publishers_or_a_readers(
    make_end: Callable[[], Any],
) -> None:
    tensors = {"w": torch.zeros(3), "sixteen": torch.ones(2, dtype=torch.bfloat16)}
    make_end().publish(1, tensors)
    tensors["w"].fill_(99)
    make_end().fetch_newer(than=0).tensors["w"].fill_(77)
    weights = make_end().fetch_newer(than=0).tensors
    assert weights["w"].tolist() == [0, 0, 0]
    assert weights["sixteen"].dtype == torch.bfloat16


def test_transposed_weights_arrive_as_they_look(make_end: Callable[[], Any]) -> None:
    transposed = torch.arange(6.0).reshape(2, 3).T
    make_end().publish(1, {"w": transposed})
    assert torch.equal(make_end().fetch_newer(than=0).tensors["w"], transposed)


def test_readers_never_see_tensors_of_two_versions(make_end: Callable[[], Any]) -> None:
    faults = list[str]()

    def read_ten() -> None:
        source, version = make_end(), 0
        for _ in range(10):
            while (weights := source.fetch_newer(than=version)) is None:
                time.sleep(0)
            values = {value for tensor in weights.tensors.values() for value in tensor.unique().tolist()}
            if values != {float(weights.version)} or weights.version <= version:
                faults.append(f"version {weights.version} after {version} held {values}")
            version = weights.version

    readers = [threading.Thread(target=read_ten, daemon=True) for _ in range(3)]
    for reader in readers:
        reader.start()
    sink, version, deadline = make_end(), 0, time.monotonic() + 30
    while any(reader.is_alive() for reader in readers):
        assert time.monotonic() < deadline
        version += 1
        sink.publish(version, {name: torch.full((64, 200), float(version)) for name in "abcd"})
    assert faults == []
    assert version >= 10


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_weights_that_are_not_finite_are_refused_and_others_may_follow(
    make_end: Callable[[], Any], value: float
) -> None:
    sink, source = make_end(), make_end()
    sink.publish(1, {"w": torch.tensor([1.0, value, 2.0]), "b": torch.ones(2)})
    with pytest.raises(DamagedWeights) as damaged:
        source.fetch_newer(than=-1)
    assert (damaged.value.version, damaged.value.why) == (1, "w: not finite")
    assert source.fetch_newer(than=-1, skip=1) is None
    sink.publish(2, {"w": torch.ones(3), "b": torch.ones(2)})
    assert source.fetch_newer(than=-1, skip=1).version == 2
