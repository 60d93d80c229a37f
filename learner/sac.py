"""Discrete soft actor-critic: the networks, their optimisers and one gradient step.

Legend: B transitions, D hidden size of the LLM, H the two critic heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from mara.common.agent import ACCEPT, REJECT, Agent, not_finite
from mara.common.config import AgentConfig
from mara.common.contracts import TransitionBatch
from mara.common.critic import TwinCritic
from mara.common.seeding import derive_seed
from mara.learner import losses
from mara.learner.config import SACConfig
from mara.learner.graphs import StepGraphs


@dataclass(frozen=True, slots=True)
class SACMetrics:
    """What one gradient step saw, before the networks moved. Means over the batch."""

    critic_loss: float
    """Squared error of the critic's heads, by the batch's weights if it has any."""
    policy_loss: float
    """Eq. 9 over the free decisions."""
    temperature_loss: float
    """Eq. 11 over the free decisions."""
    temperature: float
    """α."""
    entropy: float
    """Entropy of the policy at the free decisions, nats; at most ln 2."""
    accept_probability: float
    """Probability of accepting at the free decisions."""
    q_mean: float
    """Mean action value over heads, rows and actions."""
    q_gap: float
    """Smaller Q of accepting minus smaller Q of rejecting, at the free decisions."""
    target_mean: float
    """The critic's target."""
    critic_gradient_norm: float
    """Length of the critic's gradient before it was shortened."""
    policy_gradient_norm: float
    """The same of the agent; 0 while only the critic learns."""


class Seen(NamedTuple):
    """What the first half of a gradient step leaves on the device, beside the gradients."""

    metrics: torch.Tensor
    """float32 [11]: the fields of :class:`SACMetrics`, in their order."""
    errors_B: torch.Tensor | None
    """See :attr:`SAC.errors_B`."""


class _Forward(NamedTuple):
    """What the forward passes of a gradient step give."""

    critic_loss: torch.Tensor
    policy_loss: torch.Tensor
    temperature_loss: torch.Tensor
    metrics: torch.Tensor
    """float32 [9]: the fields of :class:`SACMetrics` but for the last two, the gradients' lengths."""
    errors_B: torch.Tensor | None


class SAC:
    """The agent, its critic and target critic, the temperature, and how one batch changes them.

    The paper's algorithm (Eq. 9–11). One process, one device. Weights, optimisers, losses and the networks'
    outputs are float32; the matrix products of the hidden layers are in ``config.precision``, as tf32 also
    those of the last ones. The same seed
    and the same batches give the same weights, bit for bit, on one machine's CPU at one number of threads.
    """

    def __init__(
        self,
        hidden_size: int,
        agent_config: AgentConfig,
        config: SACConfig,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.step = 0
        """Gradient steps done."""
        self.errors_B: torch.Tensor | None = None
        """float32 [B]: by how much the critic's heads missed the target of each row of the last batch,
        absolute and averaged over the heads. None where the rows of that batch had no weights. The next step
        may overwrite it."""
        # Made on the CPU, so that a seed gives the same networks on every device.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "sac"))
            self.agent = Agent(hidden_size, agent_config).to(self.device)
            self.critic = TwinCritic(hidden_size, config.critic_widths).to(self.device)
            self.target = TwinCritic(hidden_size, config.critic_widths).to(self.device)
        self.target.load_state_dict(self.critic.state_dict())
        self.target.requires_grad_(False)
        log_alpha = math.log(config.initial_temperature)
        self.log_alpha = nn.Parameter(torch.tensor(log_alpha, device=self.device))
        moving = [*self.critic.parameters()], [*self.agent.parameters()], [self.log_alpha]
        self.critic_optimiser = _adam(moving[0], config.critic_learning_rate)
        self.policy_optimiser = _adam(moving[1], config.policy_learning_rate)
        self.temperature_optimiser = _adam(moving[2], config.temperature_learning_rate)
        self.uses_graphs = self.device.type == "cuda" and config.cuda_graph
        self._graphs = StepGraphs(self._gradients, self._move, [p for group in moving for p in group])

    @property
    def policy_steps(self) -> int:
        """Gradient steps in which the agent itself moved. While it is 0, the agent is as it began."""
        return max(0, self.step - self.config.critic_only_steps)

    def update(self, batch: TransitionBatch, meanwhile: Callable[[], None] | None = None) -> SACMetrics:
        """Do one gradient step on ``batch``, which is on the device of the networks.

        One forward pass of the critic serves its own loss and the policy's, so the policy follows the
        critic as it was before this step. ``meanwhile`` is called while a GPU is at work on the gradients;
        what it enqueues there runs before the networks move.

        Raises:
            FloatingPointError: a loss or a gradient is not finite; the networks are left as they were. A
                parameter that is not finite makes a loss so.
        """
        policy_learns = self.step >= self.config.critic_only_steps
        with products_in(self.config.precision, self.device):
            if self.uses_graphs:
                gradients, move = self._graphs.halves(batch, policy_learns)
            else:
                gradients = partial(self._gradients, batch, policy_learns)
                move = partial(self._move, policy_learns)
            seen = gradients()
        if meanwhile is not None:
            meanwhile()
        metrics = SACMetrics(*seen.metrics.tolist())  # one wait for the device in each step
        self._check_finite(metrics)
        self.errors_B = seen.errors_B
        move()
        self.step += 1
        if self.step % self.config.target_update_period == 0:
            losses.polyak_update(self.target.parameters(), self.critic.parameters(), self.config.polyak)
        return metrics

    def _gradients(self, batch: TransitionBatch, policy_learns: bool) -> Seen:
        """Fill the gradients of all parameters that will move. Waits for nothing, moves nothing."""
        forward = self._forward(batch, policy_learns)
        # No parameter has a part in two of them, so that one pass backward does for all.
        learning = [(forward.critic_loss, self.critic_optimiser)]
        if policy_learns:
            learning.append((forward.policy_loss, self.policy_optimiser))
            if self.config.learn_temperature:
                learning.append((forward.temperature_loss, self.temperature_optimiser))
        for _, optimiser in learning:
            optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward([loss for loss, _ in learning])
        critic_norm = self._shorten(self.critic_optimiser)
        policy_norm = self._shorten(self.policy_optimiser) if policy_learns else torch.zeros_like(critic_norm)
        metrics = torch.cat((forward.metrics, torch.stack((critic_norm, policy_norm))))
        return Seen(metrics, forward.errors_B)

    def _forward(self, batch: TransitionBatch, policy_learns: bool) -> _Forward:
        """The losses of the batch, and what there is to report before their gradients are known."""
        states_BD = batch.states_BD.float()
        alpha = self.log_alpha.detach().exp()
        with self._hidden_layers():
            targets_B = self._targets(batch, alpha)
            q_HB2 = self.critic(states_BD)
            with torch.set_grad_enabled(policy_learns):
                logprobs_B2 = self.agent(states_BD)
        critic_loss = losses.critic_loss(q_HB2, batch.actions_B, targets_B, batch.weights_B)
        policy_loss = losses.policy_loss(logprobs_B2, q_HB2, alpha, batch.forced_B)
        temperature_loss = losses.temperature_loss(
            self.log_alpha, logprobs_B2, batch.forced_B, self.config.target_entropy
        )
        with torch.no_grad():
            min_q_B2 = q_HB2.amin(dim=0)
            gap_B = min_q_B2[:, ACCEPT] - min_q_B2[:, REJECT]
            metrics = {
                "critic_loss": critic_loss,
                "policy_loss": policy_loss,
                "temperature_loss": temperature_loss,
                "temperature": alpha,
                "entropy": losses.free_mean(losses.entropy(logprobs_B2), batch.forced_B),
                "accept_probability": losses.free_mean(logprobs_B2[:, ACCEPT].exp(), batch.forced_B),
                "q_mean": q_HB2.mean(),
                "q_gap": losses.free_mean(gap_B, batch.forced_B),
                "target_mean": targets_B.mean(),
            }
            errors_B = None
            if batch.weights_B is not None:
                errors_HB = losses.td_errors(q_HB2, batch.actions_B, targets_B)
                errors_B = errors_HB.abs().mean(dim=0)
            found = torch.stack([metrics[field.name] for field in fields(SACMetrics)[: len(metrics)]])
        return _Forward(critic_loss, policy_loss, temperature_loss, found, errors_B)

    def _move(self, policy_learns: bool) -> None:
        """Let the optimisers take their step by the gradients there are."""
        self.critic_optimiser.step()
        if policy_learns:
            self.policy_optimiser.step()
            if self.config.learn_temperature:
                self.temperature_optimiser.step()

    def _hidden_layers(self) -> AbstractContextManager[None]:
        """In what precision the networks compute their hidden layers, forward and backward."""
        is_low = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_low)

    @torch.no_grad()
    def _targets(self, batch: TransitionBatch, alpha: torch.Tensor) -> torch.Tensor:
        """The critic's targets [B], from the target network and the present policy at the next states."""
        next_states_BD = batch.next_states_BD.float()
        next_values_B = losses.soft_value(
            self.target(next_states_BD), self.agent(next_states_BD), alpha, batch.next_forced_B
        )
        return losses.td_target(batch.rewards_B, batch.discounts_B, next_values_B)

    def _shorten(self, optimiser: torch.optim.Optimizer) -> torch.Tensor:
        """Shorten the optimiser's gradients to what is allowed; return their length before that."""
        (group,) = optimiser.param_groups
        return nn.utils.clip_grad_norm_(group["params"], self.config.max_gradient_norm)

    def _check_finite(self, metrics: SACMetrics) -> None:
        for field in fields(metrics):
            value = getattr(metrics, field.name)
            if not math.isfinite(value):
                raise FloatingPointError(f"sac: {field.name} is {value} at gradient step {self.step}")

    def not_finite(self) -> list[str]:
        """The names of the parameters that are not finite throughout: none, as far as anybody knows.

        Too dear for every step, and no step needs it: a parameter that is not finite shows in the next loss.
        """
        networks = {"agent": self.agent, "critic": self.critic, "target": self.target}
        tensors = {f"{of}.{name}": p for of, net in networks.items() for name, p in net.named_parameters()}
        return not_finite(tensors | {"log_alpha": self.log_alpha})

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next step: networks, target, temperature, optimisers, counter.

        The tensors are the live ones, not copies.
        """
        return {
            "step": self.step,
            "log_alpha": self.log_alpha.detach(),
            "agent": self.agent.state_dict(),
            "critic": self.critic.state_dict(),
            "target": self.target.state_dict(),
            "critic_optimiser": _optimiser_state(self.critic_optimiser),
            "policy_optimiser": _optimiser_state(self.policy_optimiser),
            "temperature_optimiser": _optimiser_state(self.temperature_optimiser),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`. Learning rates stay those of the configuration."""
        self.step = state["step"]
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self.agent.load_state_dict(state["agent"])
        self.critic.load_state_dict(state["critic"])
        self.target.load_state_dict(state["target"])
        for name in ("critic_optimiser", "policy_optimiser", "temperature_optimiser"):
            optimiser: torch.optim.Optimizer = getattr(self, name)
            groups = optimiser.state_dict()["param_groups"]
            # The optimiser would take tensors of the right device and type as they are, and change them.
            by_parameter = {int(index): copy.deepcopy(values) for index, values in state[name].items()}
            optimiser.load_state_dict({"state": by_parameter, "param_groups": groups})
        self._graphs.forget()


def _adam(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Adam:
    on_gpu = parameters[0].is_cuda
    return torch.optim.Adam(parameters, lr=learning_rate, fused=True, capturable=on_gpu)


def _optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The moments of each parameter, by its number as text."""
    return {str(index): values for index, values in optimiser.state_dict()["state"].items()}


@contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Have a GPU multiply float32 matrices as ``learner.sac.precision`` asks; others know one way only."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
