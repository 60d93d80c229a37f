"""The benchmark of a gradient step by itself, against the authors' way and against the hardware.

Needs no server and no LLM. Legend: B transitions of a batch, D hidden size of the LLM.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mara.buffer.config import ReplayConfig, ShapingConfig
from mara.buffer.mirror import Mirror
from mara.common.config import AgentConfig
from mara.common.contracts import TransitionBatch
from mara.deploy.bench.figures import Figure, Rounds, in_turn, machine
from mara.deploy.bench.list_learner import ListLearner
from mara.deploy.bench.synthetic import synthetic_episodes
from mara.learner.config import SACConfig
from mara.learner.sac import SAC, products_in

Say = Callable[[str], None]
Precision = Literal["float32", "tf32", "bfloat16"]

DISTINCT_EPISODES = 32


@dataclass(frozen=True, slots=True)
class LearnerSizes:
    """What is measured with; the defaults are the paper's."""

    hidden_size: int = 4096
    batch_size: int = 1024
    widths: tuple[int, int] = (1024, 256)
    """Of the agent and of each critic head."""
    capacity: int = 1_000_000
    """Transitions in the ring, which is full. Fewer where they would take more than half of the memory."""
    peer_capacity: int = 2048
    """Transitions in the peer's lists; two batches at the least."""
    inserted_per_s: float = 5000.0
    """Transitions that another process appends to the log: about what one GPU writes with an 8 B LLM."""
    live_s: float = 20.0
    """How long the learner trains on the log that grows."""
    precision: Precision = "float32"
    device: str = "auto"
    num_threads: int = 1
    """Of torch, in the learner and in the peer."""

    @property
    def agent(self) -> AgentConfig:
        return AgentConfig(widths=self.widths)

    @property
    def sac(self) -> SACConfig:
        return SACConfig(critic_widths=self.widths, precision=self.precision)


def make_mirror(sizes: LearnerSizes, device: torch.device) -> Mirror:
    """An empty ring for synthetic episodes."""
    return Mirror(
        sizes.hidden_size,
        ReplayConfig(capacity_transitions=sizes.capacity),
        ShapingConfig(score_weights={"helpful": 1.0}),
        device,
    )


def fill(mirror: Mirror, sizes: LearnerSizes) -> None:
    """Put synthetic episodes into the ring until it has room for no other one."""
    episodes = synthetic_episodes(DISTINCT_EPISODES, sizes.hidden_size)
    while mirror.total_transitions < sizes.capacity:
        mirror.add(episodes)


def step_figures(sizes: LearnerSizes, sac: SAC, mirror: Mirror, num_rounds: int, say: Say) -> list[Figure]:
    """Feed and step against the authors' way and the hardware, with nothing else going on."""
    torch.set_num_threads(sizes.num_threads)
    device, B = sac.device, sizes.batch_size
    peer_capacity = max(sizes.peer_capacity, 2 * B)
    say(f"the authors' way: {peer_capacity} transitions as lists")
    peer = ListLearner(sizes.hidden_size, sizes.widths, sizes.sac, peer_capacity, B, device)
    draws = torch.Generator().manual_seed(1)

    def sample() -> TransitionBatch:
        """As the learner's loop does: up to float32 states, which is where the peer's ends as well."""
        return mirror.sample(B, draws, torch.float32)

    batch = sample()
    feed = per_second(sample, 20, device)
    step = per_second(lambda: sac.update(batch), 5, device)
    whole = per_second(lambda: sac.update(sample()), 5, device)
    their_feed = per_second(peer.sample, 2, device)
    their_whole = per_second(lambda: peer.update(peer.sample()), 2, device)
    for measure in (feed, whole, their_whole):
        measure(0)  # warm
    say(f"feed and step: {num_rounds} rounds")
    feeds = in_turn(feed, their_feed, num_rounds)
    wholes = in_turn(whole, their_whole, num_rounds)
    say(f"the hardware: {num_rounds} rounds")
    ceilings: list[dict[str, float]] = []

    def floor(_round: int) -> float:
        ceilings.append(_ceilings(device, sizes.precision))
        return 1 / floor_s(sizes, **ceilings[-1])

    floors = in_turn(step, floor, num_rounds)
    measured = {name: statistics.median(c[name] for c in ceilings) for name in ceilings[0]}
    bytes_each = mirror.nbytes / mirror.num_transitions
    way = "lists of Python floats, unshared passes, float32, plain Adam"
    return [
        _figure("step_vs_list_feed", sizes, wholes, "updates/s", way),
        _figure(
            "feed_vs_list_feed",
            sizes,
            feeds,
            "batches/s",
            "random.sample, float32 tensors of lists by numpy",
            included="drawing, gathering, float32 states in memory that is used again",
        ),
        Figure(
            figure="memory_vs_list_feed",
            value=bytes_each,
            unit="bytes",
            peer=way,
            ratio=peer.bytes_per_transition / bytes_each,
            conditions=conditions(sizes) | {"peer_value": peer.bytes_per_transition},
        ),
        Figure(
            figure="updates_per_s",
            value=statistics.median(wholes.ours),
            unit="updates/s",
            conditions=conditions(sizes),
        ),
        _figure(
            "step_vs_floor", sizes, floors, "updates/s", "FLOPs and bytes over measured ceilings", **measured
        ),
    ]


def floor_s(sizes: LearnerSizes, flops_per_s: float, bytes_per_s: float) -> float:
    """The least seconds that a gradient step can take, by the products and the memory traffic it needs.

    The gradients take at least their products and at least the reading of states and weights; the optimisers
    need all of them for their norm, so they come after, and go through weights, gradients and two moments.
    Counted are the agent twice forward (states, next states), critic and target critic once, and agent and
    critic backward, where the first layer needs no gradient of its input.
    """
    D, (first, second), B = sizes.hidden_size, sizes.widths, sizes.batch_size
    outer, inner = D * first, first * second + 2 * second
    agent, critic = outer + inner, 2 * (outer + inner)  # weights; the critic has two heads
    forward = 2 * agent + 2 * critic
    backward = (outer + 2 * inner) + 2 * (outer + 2 * inner)
    flops = 2 * B * (forward + backward)
    gradient_bytes = 4 * 2 * B * D + 4 * (agent + 2 * critic) + 4 * (agent + critic)
    optimiser_bytes = 4 * 7 * (agent + critic) + 4 * 3 * critic / sizes.sac.target_update_period
    return max(flops / flops_per_s, gradient_bytes / bytes_per_s) + optimiser_bytes / bytes_per_s


def _ceilings(device: torch.device, precision: Precision) -> dict[str, float]:
    """The best rate, of five, of products of square matrices, and of bytes read and written in place.

    In place, as the optimisers do it: where a copy goes to other memory, a processor fetches that as well
    before it writes, and the rate comes out too low.
    """
    on_gpu = device.type == "cuda"
    size, times = (4096, 20) if on_gpu else (2048, 1)  # on a GPU so many that launching counts for nothing
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    long = torch.zeros(64 << 20, device=device)
    with products_in(precision, device):
        products = max(per_second(lambda: a @ a, times, device)(0) for _ in range(5))
    passes = max(per_second(lambda: long.mul_(0.5), times, device)(0) for _ in range(5))
    return {"flops_per_s": 2 * size**3 * products, "bytes_per_s": 2 * long.nbytes * passes}


def per_second(work: Callable[[], object], times: int, device: torch.device) -> Callable[[int], float]:
    """Measures how often a second ``work`` is done, over ``times`` of it, to the end of its work on a GPU."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measure(_round: int) -> float:
        wait()
        began = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        return times / (time.perf_counter() - began)

    return measure


def _figure(name: str, sizes: LearnerSizes, rounds: Rounds, unit: str, peer: str, **more: Any) -> Figure:
    return Figure(
        figure=name,
        value=statistics.median(rounds.ours),
        unit=unit,
        peer=peer,
        ratio=rounds.ratio,
        conditions=conditions(sizes)
        | {"rounds": len(rounds.ours), "peer_value": statistics.median(rounds.peers), **more},
    )


def conditions(sizes: LearnerSizes) -> dict[str, Any]:
    return machine() | {
        "hidden_size": sizes.hidden_size,
        "batch_size": sizes.batch_size,
        "widths": list(sizes.widths),
        "capacity": sizes.capacity,
        "precision": sizes.precision,
        "device": sizes.device,
    }
