"""One gradient step against the algorithm written out plainly, and what a step must not do."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mara.learner.graphs as learner_graphs
from mara.common.config import AgentConfig
from mara.common.contracts import TransitionBatch
from mara.learner.config import SACConfig
from mara.learner.sac import SAC, Seen, products_in

BatchMaker = Callable[..., TransitionBatch]
D = 12
AGENT = AgentConfig(widths=(16, 8))
CONFIG = SACConfig(
    critic_widths=(16, 8),
    critic_learning_rate=1e-2,
    policy_learning_rate=1e-2,
    temperature_learning_rate=1e-2,
    initial_temperature=0.2,
    target_update_period=2,
    polyak=0.1,
)


def make_sac(seed: int = 0, **changes: object) -> SAC:
    return SAC(D, AGENT, CONFIG.model_copy(update=changes), seed=seed)


class PlainSAC:
    """The same algorithm row by row and pass by pass, with nothing shared and plain Adam."""

    def __init__(self, sac: SAC) -> None:
        self.config = sac.config
        self.agent, self.critic = copy.deepcopy(sac.agent), copy.deepcopy(sac.critic)
        self.target = copy.deepcopy(sac.target)
        self.log_alpha = sac.log_alpha.detach().clone().requires_grad_()
        self.adams = [
            torch.optim.Adam(self.critic.parameters(), self.config.critic_learning_rate),
            torch.optim.Adam(self.agent.parameters(), self.config.policy_learning_rate),
            torch.optim.Adam([self.log_alpha], self.config.temperature_learning_rate),
        ]
        self.step = 0

    def update(self, batch: TransitionBatch) -> None:
        alpha = math.exp(self.log_alpha.item())
        critic_terms, policy_terms, temperature_terms = [], [], []
        for b in range(len(batch)):
            state, next_state = batch.states_BD[b : b + 1], batch.next_states_BD[b : b + 1]
            with torch.no_grad():
                next_q = self.target(next_state).amin(0)[0]
                next_pi = self.agent(next_state)[0].exp()
                if batch.next_forced_B[b]:
                    value = next_q[1]
                else:
                    value = sum(next_pi[a] * (next_q[a] - alpha * next_pi[a].log()) for a in (0, 1))
                target = batch.rewards_B[b] + batch.discounts_B[b] * value
            for head in self.critic(state)[:, 0]:
                critic_terms.append((head[batch.actions_B[b]] - target) ** 2)
            if not batch.forced_B[b]:
                with torch.no_grad():
                    q = self.critic(state).amin(0)[0]
                pi = self.agent(state)[0].exp()
                policy_terms.append(sum(pi[a] * (alpha * pi[a].log() - q[a]) for a in (0, 1)))
                entropy = -sum(pi[a] * pi[a].log() for a in (0, 1)).detach()
                temperature_terms.append(self.log_alpha.exp() * (entropy - self.config.target_entropy))
        all_terms = [critic_terms]
        if self.step >= self.config.critic_only_steps:
            all_terms += [policy_terms, temperature_terms]
        for terms, adam in zip(all_terms, self.adams, strict=False):
            adam.zero_grad()
            torch.stack(terms).mean().backward()
        for adam in self.adams[: len(all_terms)]:
            if adam is not self.adams[2]:
                parameters = adam.param_groups[0]["params"]
                torch.nn.utils.clip_grad_norm_(parameters, self.config.max_gradient_norm)
            adam.step()
        self.step += 1
        if self.step % self.config.target_update_period == 0:
            for t, o in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                t.data = (1 - self.config.polyak) * t.data + self.config.polyak * o.data


def assert_same(sac: SAC, plain: PlainSAC) -> None:
    for name in ("agent", "critic", "target"):
        ours, theirs = getattr(sac, name).state_dict(), getattr(plain, name).state_dict()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=2e-5, msg=f"{name}.{key}")
    assert sac.log_alpha.item() == pytest.approx(plain.log_alpha.item(), abs=1e-6)


@pytest.mark.parametrize("critic_only_steps", [0, 2])
def test_updates_equal_the_plainly_written_algorithm(make_batch: BatchMaker, critic_only_steps: int) -> None:
    sac = make_sac(critic_only_steps=critic_only_steps)
    plain = PlainSAC(sac)
    for step in range(5):
        batch = make_batch(24, D, seed=step)
        sac.update(batch)
        plain.update(batch)
        assert_same(sac, plain)


def test_while_only_the_critic_learns_the_agent_and_temperature_stay(make_batch: BatchMaker) -> None:
    sac = make_sac(critic_only_steps=3)
    before = copy.deepcopy(sac.state_dict())
    for step in range(3):
        metrics = sac.update(make_batch(seed=step))
        assert metrics.policy_gradient_norm == 0.0
    torch.testing.assert_close(sac.agent.state_dict(), before["agent"], rtol=0, atol=0)
    assert sac.log_alpha.item() == before["log_alpha"].item()
    assert not torch.equal(sac.critic.linear1.weight, before["critic"]["linear1.weight"])
    assert sac.update(make_batch(seed=3)).policy_gradient_norm > 0
    assert not torch.equal(sac.agent.linear1.weight, before["agent"]["linear1.weight"])


def test_what_is_done_meanwhile_sees_the_networks_as_they_were(make_batch: BatchMaker) -> None:
    sac, plain = make_sac(), make_sac()
    before = copy.deepcopy(sac.state_dict())
    seen = []
    metrics = sac.update(make_batch(seed=1), lambda: seen.append(copy.deepcopy(sac.state_dict())))
    torch.testing.assert_close(seen, [before], rtol=0, atol=0)
    assert metrics == plain.update(make_batch(seed=1))
    torch.testing.assert_close(sac.agent.state_dict(), plain.agent.state_dict(), rtol=0, atol=0)


class Graph:
    """Stands in for a CUDA graph: does the work again, and leaves the results in the tensors of the first."""

    def __init__(self, work: Callable[[], Seen | None], results: Seen | None) -> None:
        self._work, self._results = work, results
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        found = self._work()
        for own, new in zip(self._results or (), found or (), strict=True):
            if own is not None:
                own.copy_(new)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """What was captured as graphs, which a CPU has none of."""
    captured: list[Graph] = []

    def capture(work: Callable[[], Any], device: torch.device, warm_ups: int = 3) -> tuple[Graph, Any]:
        is_moving = warm_ups == 0  # The capture of a move must leave the networks as they are.
        results = None if is_moving else [work() for _ in range(warm_ups)][-1]
        captured.append(Graph(work, results))
        return captured[-1], results

    monkeypatch.setattr("mara.learner.graphs.capture", capture)
    return captured


def test_steps_by_graphs_are_the_steps_without(
    make_batch: BatchMaker, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    sac, plain = make_sac(critic_only_steps=7), make_sac(critic_only_steps=7)
    sac.uses_graphs = True
    capture, have_moments = learner_graphs.capture, list[tuple[bool, bool]]()

    def watched(work: Callable[[], Any], device: torch.device, warm_ups: int = 3) -> tuple[Graph, Any]:
        have_moments.append((bool(sac.critic_optimiser.state), bool(sac.policy_optimiser.state)))
        return capture(work, device, warm_ups)

    monkeypatch.setattr("mara.learner.graphs.capture", watched)
    batches = list[tuple[TransitionBatch, TransitionBatch]]()
    for number in range(20):
        batch = make_batch(seed=number, weights_B=torch.rand(32))
        if number in (0, 1, 2, 9):  # Also the first ones, before the optimisers have moved anything.
            batch.rewards_B[0] = math.nan
            for each in (sac, plain):
                with pytest.raises(FloatingPointError):
                    each.update(batch)
            continue
        batches.append((batch, copy.deepcopy(batch)))
        assert sac.update(batch) == plain.update(batch)
        assert sac.errors_B is not None and plain.errors_B is not None
        torch.testing.assert_close(sac.errors_B, plain.errors_B, rtol=0, atol=0)
    # Moments that are made during a capture would be made anew by each replay.
    assert have_moments == [(True, False)] * 2 + [(True, True)] * 2
    for batch, before in batches:  # On a GPU the ring owns their memory, and draws into it.
        for field in dataclasses.fields(batch):
            torch.testing.assert_close(
                getattr(batch, field.name), getattr(before, field.name), rtol=0, atol=0, equal_nan=True
            )
    torch.testing.assert_close(sac.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert len(graphs) == 4  # two for the steps of the critic alone, two for those of both


def test_graphs_are_made_anew_for_other_shapes_and_after_loading(
    make_batch: BatchMaker, graphs: list[Graph]
) -> None:
    sac, plain = make_sac(), make_sac()
    sac.uses_graphs = True
    for number in range(5):
        for each in (sac, plain):
            each.update(make_batch(seed=number))
    assert len(graphs) == 2
    state = copy.deepcopy(plain.state_dict())
    for number in range(5):
        for each in (sac, plain):
            each.update(make_batch(16, seed=number))
    assert len(graphs) == 4
    replays = [graph.num_replays for graph in graphs]
    for each in (sac, plain):
        each.load_state_dict(copy.deepcopy(state))
        each.update(make_batch(16, seed=9))
    # The optimisers have other memory: this step went without.
    assert [graph.num_replays for graph in graphs] == replays
    torch.testing.assert_close(sac.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("precision", "expected"), [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")]
)
def test_a_gpu_multiplies_as_precision_asks_during_a_step_alone(precision: str, expected: str) -> None:
    matmul = torch.backends.cuda.matmul
    before, device = matmul.fp32_precision, torch.device("cuda")
    for outside in ("ieee", "tf32"):
        matmul.fp32_precision = outside
        try:
            with products_in(precision, device):
                seen = matmul.fp32_precision
            assert seen == expected
            assert matmul.fp32_precision == outside
            with products_in(precision, torch.device("cpu")):
                assert matmul.fp32_precision == outside
        finally:
            matmul.fp32_precision = before


def test_a_fixed_temperature_stays(make_batch: BatchMaker) -> None:
    sac = make_sac(learn_temperature=False)
    for step in range(3):
        assert sac.update(make_batch(seed=step)).temperature == pytest.approx(0.2)


def test_forced_decisions_alone_teach_only_the_critic(make_batch: BatchMaker) -> None:
    sac = make_sac()
    before = copy.deepcopy(sac.state_dict())
    all_forced = torch.ones(32, dtype=torch.bool)
    sac.update(make_batch(32, forced_B=all_forced, actions_B=torch.ones(32, dtype=torch.int64)))
    torch.testing.assert_close(sac.agent.state_dict(), before["agent"], rtol=0, atol=0)
    assert sac.log_alpha.item() == before["log_alpha"].item()
    assert not torch.equal(sac.critic.linear1.weight, before["critic"]["linear1.weight"])


def test_metrics_describe_the_batch_before_the_networks_moved(make_batch: BatchMaker) -> None:
    sac = make_sac()
    batch = make_batch(64)
    with torch.no_grad():
        free = ~batch.forced_B
        accept = sac.agent(batch.states_BD)[:, 1].exp()[free]
        q = sac.critic(batch.states_BD)
        gap = (q.amin(0)[:, 1] - q.amin(0)[:, 0])[free]
    metrics = sac.update(batch)
    entropy = -(accept * accept.log() + (1 - accept) * (1 - accept).log())
    assert metrics.accept_probability == pytest.approx(accept.mean().item(), rel=1e-5)
    assert metrics.entropy == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert metrics.q_mean == pytest.approx(q.mean().item(), rel=1e-4)
    assert metrics.q_gap == pytest.approx(gap.mean().item(), rel=1e-4)
    assert metrics.temperature == pytest.approx(0.2)
    assert metrics.policy_loss == pytest.approx(
        -(0.2 * entropy + accept * q.amin(0)[free, 1] + (1 - accept) * q.amin(0)[free, 0]).mean().item(),
        rel=1e-4,
    )


def test_the_seed_decides_the_networks_and_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = make_sac(seed=1), make_sac(seed=1), make_sac(seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.critic.linear1.weight, same.critic.linear1.weight)
    assert torch.equal(one.agent.linear1.weight, same.agent.linear1.weight)
    assert not torch.equal(one.critic.linear1.weight, other.critic.linear1.weight)


def test_the_target_starts_as_the_critic_and_follows_only_when_it_is_due(make_batch: BatchMaker) -> None:
    sac = make_sac(target_update_period=3)
    start = sac.critic.linear1.weight.detach().clone()
    for _ in range(2):
        sac.update(make_batch())
        assert torch.equal(sac.target.linear1.weight, start)
    sac.update(make_batch())
    expected = start + 0.1 * (sac.critic.linear1.weight.detach() - start)
    torch.testing.assert_close(sac.target.linear1.weight, expected)


def test_a_loss_that_is_not_finite_is_named_and_changes_nothing(make_batch: BatchMaker) -> None:
    sac = make_sac()
    sac.update(make_batch())
    before = copy.deepcopy(sac.state_dict())
    rewards = torch.zeros(32)
    rewards[3] = math.nan
    with pytest.raises(FloatingPointError, match="critic_loss is nan at gradient step 1"):
        sac.update(make_batch(32, rewards_B=rewards))
    torch.testing.assert_close(sac.state_dict(), before, rtol=0, atol=0)


def test_what_lies_beyond_the_end_of_an_episode_changes_nothing(make_batch: BatchMaker) -> None:
    one, other = make_sac(), make_sac()
    batch = make_batch()
    after_end = batch.discounts_B == 0
    assert after_end.any()
    elsewhere = batch.next_states_BD.clone()
    elsewhere[after_end] = math.nan
    one.update(batch)
    other.update(dataclasses.replace(batch, next_states_BD=elsewhere))
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_loaded_state_goes_on_bit_for_bit(make_batch: BatchMaker) -> None:
    sac = make_sac()
    for step in range(3):
        sac.update(make_batch(seed=step))
    fresh = make_sac(seed=9)
    fresh.load_state_dict(sac.state_dict())
    for step in range(3, 6):  # One after the other: they share nothing.
        assert sac.update(make_batch(seed=step)) == fresh.update(make_batch(seed=step))
    torch.testing.assert_close(sac.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_the_weights_of_a_batch_count_in_the_critic_loss_and_its_errors_come_back(
    make_batch: BatchMaker,
) -> None:
    """Where no value follows, the error of a head is what the reward and its estimate differ by."""
    sac = make_sac()
    weights_B = torch.linspace(0.1, 1, 32)
    batch = make_batch(weights_B=weights_B, discounts_B=torch.zeros(32))
    with torch.no_grad():
        q_HB2 = sac.critic(batch.states_BD)
    taken_HB = torch.stack([q_HB2[head, range(32), batch.actions_B] for head in (0, 1)])
    errors_HB = taken_HB - batch.rewards_B
    metrics = sac.update(batch)
    assert sac.errors_B is not None
    torch.testing.assert_close(sac.errors_B, errors_HB.abs().mean(0))
    assert metrics.critic_loss == pytest.approx((weights_B * errors_HB.square()).mean().item())
    sac.update(make_batch())
    assert sac.errors_B is None


def test_in_bfloat16_only_the_products_of_the_hidden_layers_are_rounded(make_batch: BatchMaker) -> None:
    batch = make_batch(64)
    exact, rounded = make_sac(), make_sac(precision="bfloat16")
    seen: dict[str, torch.dtype] = {}
    for name in ("linear2", "output_linear"):
        layer = getattr(rounded.agent, name)
        layer.register_forward_hook(lambda _l, _i, out, name=name: seen.__setitem__(name, out.dtype))
    rounded.critic.output_linear.register_forward_hook(
        lambda _l, _i, out: seen.__setitem__("critic", out.dtype)
    )
    for _ in range(5):
        expected, found = exact.update(batch), rounded.update(batch)
    assert seen == {"linear2": torch.bfloat16, "output_linear": torch.float32, "critic": torch.float32}
    assert all(p.dtype == torch.float32 for p in (*rounded.agent.parameters(), *rounded.critic.parameters()))
    assert found.critic_loss == pytest.approx(expected.critic_loss, rel=0.02)
    assert found.critic_gradient_norm == pytest.approx(expected.critic_gradient_norm, rel=0.05)
    assert found != expected
