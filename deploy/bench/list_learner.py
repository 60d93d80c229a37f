"""The learner as the authors' code has it, written anew: the peer of the benchmark.

Legend: B transitions of a batch, D hidden size of the LLM.
"""

from __future__ import annotations

import math
import random

import numpy as np
import psutil
import torch
from torch import nn

from mara.learner import losses
from mara.learner.config import SACConfig

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""States [B, D], actions [B], rewards [B], next states [B, D] and ends [B]."""
_EPISODE = 128
_DISCOUNT = 0.99


class ListLearner:
    """Transitions as lists of Python floats, and a forward pass for each use of a network.

    Every transition has its state and its next state as a list; a batch is drawn with ``random.sample`` and
    made into tensors. The critic has two networks, the target two more; critic, policy and temperature are
    updated one after the other, each with passes of its own (Eq. 9–11).
    """

    def __init__(
        self,
        hidden_size: int,
        widths: tuple[int, int],
        config: SACConfig,
        capacity: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self._config = config
        self._batch_size = batch_size
        self._device = device
        D = hidden_size
        self._agent = _mlp(D, widths).to(device)
        self._critics = nn.ModuleList([_mlp(D, widths), _mlp(D, widths)]).to(device)
        self._targets = nn.ModuleList([_mlp(D, widths), _mlp(D, widths)]).to(device).requires_grad_(False)
        self._targets.load_state_dict(self._critics.state_dict())
        self._log_alpha = torch.tensor(
            math.log(self._config.initial_temperature), device=device, requires_grad=True
        )
        self._critic_adam = torch.optim.Adam(self._critics.parameters(), self._config.critic_learning_rate)
        self._policy_adam = torch.optim.Adam(self._agent.parameters(), self._config.policy_learning_rate)
        self._alpha_adam = torch.optim.Adam([self._log_alpha], self._config.temperature_learning_rate)
        self._step = 0
        before = psutil.Process().memory_info().rss
        draws = torch.Generator().manual_seed(2)
        self._memory = [
            (
                torch.randn(D, generator=draws).tolist(),
                number % 2,
                0.5,
                torch.randn(D, generator=draws).tolist(),
                number % _EPISODE == _EPISODE - 1,
            )
            for number in range(capacity)
        ]
        self.bytes_per_transition = (psutil.Process().memory_info().rss - before) / capacity
        """Growth of the process by the lists."""

    def sample(self) -> Batch:
        """Draw a batch, without replacement."""
        columns = zip(*random.sample(self._memory, self._batch_size), strict=True)
        states, actions, rewards, next_states, ends = columns
        # By way of numpy, which reads lists of lists in a third of the time that torch.tensor takes.
        return (
            torch.from_numpy(np.array(states, np.float32)).to(self._device),
            torch.tensor(actions, device=self._device),
            torch.tensor(rewards, device=self._device),
            torch.from_numpy(np.array(next_states, np.float32)).to(self._device),
            torch.tensor(ends, dtype=torch.float32, device=self._device),
        )

    def update(self, batch: Batch) -> float:
        """Do one gradient step; return the critic's loss."""
        states_BD, actions_B, rewards_B, next_states_BD, ends_B = batch
        alpha, clip = self._log_alpha.detach().exp(), self._config.max_gradient_norm
        with torch.no_grad():
            logprobs_B2 = self._agent(next_states_BD).log_softmax(-1)
            q_B2 = torch.minimum(*(target(next_states_BD) for target in self._targets))
            values_B = (logprobs_B2.exp() * (q_B2 - alpha * logprobs_B2)).sum(-1)
            targets_B = rewards_B + (1 - ends_B) * _DISCOUNT * values_B
        index_B1 = actions_B.unsqueeze(-1)
        critic_loss = sum(
            (critic(states_BD).gather(-1, index_B1).squeeze(-1) - targets_B).square().mean()
            for critic in self._critics
        )
        self._critic_adam.zero_grad()
        critic_loss.backward()
        nn.utils.clip_grad_norm_(self._critics.parameters(), clip)
        self._critic_adam.step()

        logprobs_B2 = self._agent(states_BD).log_softmax(-1)
        with torch.no_grad():
            q_B2 = torch.minimum(*(critic(states_BD) for critic in self._critics))
        policy_loss = (logprobs_B2.exp() * (alpha * logprobs_B2 - q_B2)).sum(-1).mean()
        self._policy_adam.zero_grad()
        policy_loss.backward()
        nn.utils.clip_grad_norm_(self._agent.parameters(), clip)
        self._policy_adam.step()

        entropy_B = -(logprobs_B2.exp() * logprobs_B2).sum(-1).detach()
        alpha_loss = (self._log_alpha.exp() * (entropy_B - self._config.target_entropy)).mean()
        self._alpha_adam.zero_grad()
        alpha_loss.backward()
        self._alpha_adam.step()
        self._step += 1
        if self._step % self._config.target_update_period == 0:
            losses.polyak_update(self._targets.parameters(), self._critics.parameters(), self._config.polyak)
        for loss in (policy_loss, alpha_loss):
            loss.item()  # the authors log them
        return float(critic_loss.detach())


def _mlp(hidden_size: int, widths: tuple[int, int]) -> nn.Sequential:
    first, second = widths
    return nn.Sequential(
        nn.LayerNorm(hidden_size),
        nn.Linear(hidden_size, first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, 2),
    )
