"""Publishing in the background: the caller never waits, the latest wins, nothing is silently lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from mara.buffer.config import ReplayConfig
from mara.buffer.connection import connect
from mara.buffer.memory import MemoryWeightChannel
from mara.buffer.publisher import BackgroundWeights
from mara.buffer.server import EmbeddedServer
from mara.buffer.weights import RedisWeightChannel
from mara.common.contracts import WeightSink
from mara.common.errors import ReplayUnavailable


class Gated(MemoryWeightChannel):
    """Stores nothing while its gate is closed; notes what it was asked for."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.reached = threading.Event()
        self.asked: list[int] = []
        self.error = error

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        self.asked.append(version)
        self.reached.set()
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return super().publish(version, tensors)


class SlowToLook(MemoryWeightChannel):
    """Has lost its weights; while its gate is closed nobody hears of it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.is_looking = threading.Event()

    def holds(self, version: int) -> bool:
        found = super().holds(version)
        self.is_looking.set()
        assert self.gate.wait(20)
        return found


class Counting(RedisWeightChannel):
    """Counts the publications that it did not take."""

    num_refused = 0

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        is_taken = super().publish(version, tensors)
        self.num_refused += not is_taken
        return is_taken


@pytest.fixture
def in_background() -> Iterator[Callable[[WeightSink], BackgroundWeights]]:
    made: list[BackgroundWeights] = []

    def make(sink: WeightSink) -> BackgroundWeights:
        made.append(BackgroundWeights(sink))
        return made[-1]

    yield make
    for weights in made:
        weights.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: server.pid is None)


def of(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), value)}


def test_while_a_store_is_slow_the_caller_goes_on_and_the_latest_wins(
    in_background: Callable[[WeightSink], BackgroundWeights],
) -> None:
    sink = Gated()
    weights = in_background(sink)
    live = torch.zeros(3)
    weights.publish(0, {"w": live})
    assert sink.reached.wait(20)
    for version in (1, 2, 3):
        live.fill_(version)
        assert weights.publish(version, {"w": live})
    live.fill_(99)  # the next gradient step
    assert weights.holds(3), "it is on its way"
    sink.gate.set()
    wait_until(lambda: sink.latest_version() == 3)
    assert sink.asked == [0, 3]
    assert weights.num_replaced == 2
    latest = sink.fetch_newer(than=0)
    assert latest is not None and latest.tensors["w"].tolist() == [3, 3, 3]


def test_the_end_waits_for_the_last_publication() -> None:
    sink = Gated()
    with BackgroundWeights(sink) as weights:
        weights.publish(0, of(0))
        assert sink.reached.wait(20)
        weights.publish(1, of(1))
        threading.Timer(0.2, sink.gate.set).start()
    assert sink.latest_version() == 1


def test_what_the_store_raises_reaches_the_next_call(
    in_background: Callable[[WeightSink], BackgroundWeights], caplog: pytest.LogCaptureFixture
) -> None:
    sink = Gated(ReplayUnavailable("the replay store has not answered for 60 s"))
    weights = in_background(sink)
    weights.publish(0, of(0))
    sink.gate.set()
    wait_until(lambda: not weights._thread.is_alive())
    with pytest.raises(ReplayUnavailable):
        weights.publish(1, of(1))
    with pytest.raises(ReplayUnavailable):
        weights.holds(0)
    weights.close()
    assert "the last weights were not published: the replay store has not answered" in caplog.text


def test_weights_reach_a_store_that_was_away_and_their_loss_is_noticed(
    in_background: Callable[[WeightSink], BackgroundWeights], run_id: str
) -> None:
    config = ReplayConfig(retry_first_s=0.01, retry_longest_s=0.05)
    with EmbeddedServer(max_bytes=1 << 26) as server:
        channel = Counting(connect(server.url), run_id, config)
        weights = in_background(channel)
        kill(server)
        weights.publish(4, of(4))
        wait_until(lambda: channel.num_refused > 2)
        server.start()
        reader = RedisWeightChannel(connect(server.url), run_id, config)
        wait_until(lambda: reader.latest_version() == 4)
        wait_until(lambda: weights.holds(4))
        kill(server)
        server.start()  # without weights
        wait_until(lambda: not weights.holds(4))
        weights.publish(4, of(4))
        wait_until(lambda: reader.latest_version() == 4)
        assert weights.num_replaced == 0


def test_a_loss_that_is_seen_after_the_next_publication_is_not_a_loss_of_that(
    in_background: Callable[[WeightSink], BackgroundWeights],
) -> None:
    """Else it would be published twice, which a store refuses."""
    sink = SlowToLook()
    weights = in_background(sink)
    weights.holds(4)
    assert sink.is_looking.wait(20)  # and will say that there is nothing
    weights.publish(5, of(5))
    sink.gate.set()
    wait_until(lambda: not (weights._waiting or weights._in_hand))
    assert sink.latest_version() == 5
    assert weights.holds(5)


def test_a_loss_is_over_once_the_weights_are_published_again(
    in_background: Callable[[WeightSink], BackgroundWeights],
) -> None:
    sink = SlowToLook()
    sink.gate.set()
    weights = in_background(sink)
    wait_until(lambda: not weights.holds(4))
    weights.publish(4, of(4))
    wait_until(lambda: not (weights._waiting or weights._in_hand))
    assert weights.holds(4)
