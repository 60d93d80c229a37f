"""The agent: the small network that accepts or rejects a candidate token, and its files.

Legend: B rows, D hidden size of the LLM.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mara.common.config import AgentConfig
from mara.common.contracts import VersionedWeights
from mara.common.errors import UserError
from mara.common.files import replacing, write_whole

ACCEPT = 1
REJECT = 0

WEIGHTS_FILE = "agent.safetensors"
CARD_FILE = "agent.json"
CRITIC_FILE = "critic.safetensors"
"""Beside the agent's weights; an agent that was imported has none. Read by :mod:`mara.common.critic`."""
DIGESTS = {WEIGHTS_FILE: "weights_sha256", CRITIC_FILE: "critic_sha256"}
"""Name in the card of each file's SHA-256, which an agent that was handed on has."""


class Agent(nn.Module):
    """Maps the LLM's hidden state at a candidate to the odds of accepting it (section 3.2).

    The layer names are those of the released networks. 4.47 M parameters at D = 4096.
    """

    def __init__(self, hidden_size: int, config: AgentConfig) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.config = config
        first, second = config.widths
        self.ln = nn.LayerNorm(hidden_size)
        self.linear1 = nn.Linear(hidden_size, first)
        self.linear2 = nn.Linear(first, second)
        self.output_linear = nn.Linear(second, 2)
        # Small last layer: the initial policy is what accept_bias says, not a draw of the seed.
        with torch.no_grad():
            self.output_linear.weight.mul_(0.01)
            self.output_linear.bias[REJECT] = -config.accept_bias / 2
            self.output_linear.bias[ACCEPT] = config.accept_bias / 2

    def forward(self, states_BD: torch.Tensor) -> torch.Tensor:
        """Return float32 [B, 2] log-probabilities; column 0 rejects, column 1 accepts.

        ``states_BD`` may have any float dtype; the arithmetic is in that of the weights.
        """
        x = torch.relu(normalised_linear(states_BD, self.ln, self.linear1))
        x = torch.relu(self.linear2(x))
        logits_B2 = full_precision(self.output_linear, x).float()
        if (bound := self.config.max_log_odds) is not None:
            log_odds_B = logits_B2[:, ACCEPT] - logits_B2[:, REJECT]
            half_B = bound * torch.tanh(log_odds_B / bound) / 2
            logits_B2 = torch.stack((-half_B, half_B), dim=-1)
        return torch.log_softmax(logits_B2, dim=-1)


def full_precision(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return ``layer(x)`` in the dtype of its weights, also where autocast asks for less.

    The last layer's outputs are what decides, and differences between them are small.
    """
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(next(layer.parameters()).dtype))  # type: ignore[no-any-return]


def normalised_linear(states_BD: torch.Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> torch.Tensor:
    """Return ``linear(norm(states_BD))`` [B, outputs]; the states are converted to the dtype of the weights.

    Where a gradient will be wanted, the norm's scale and shift are moved into the linear layer: its input
    then has no parameters behind it, and the backward pass saves one of its two matrix products. The
    gradients are the same. On a GPU that multiplies in 16 bit the product is cheaper than moving the scale.
    """
    states_BD = states_BD.to(norm.weight.dtype)
    product_is_cheap = states_BD.is_cuda and torch.is_autocast_enabled("cuda")
    if product_is_cheap or not torch.is_grad_enabled():
        return linear(norm(states_BD))  # type: ignore[no-any-return]
    x_BD = nn.functional.layer_norm(states_BD, norm.normalized_shape, eps=norm.eps)
    bias = torch.addmv(linear.bias, linear.weight, norm.bias)
    return nn.functional.linear(x_BD, linear.weight * norm.weight, bias)


def agent_digest(hidden_size: int, config: AgentConfig) -> str:
    """SHA-256, in hex, of what gives an agent's weights their meaning: its shape and its settings."""
    content = {"hidden_size": hidden_size, **config.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of those that are not finite throughout."""
    # The extremes carry a NaN, and take one pass without memory of its own.
    return [
        name
        for name, tensor in tensors.items()
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax())
    ]


def why_unfit(agent: Agent, weights: VersionedWeights) -> str | None:
    """Why ``weights`` are those of another agent than ``agent``, in a few words; None if they are not.

    Looks at the digest, the names, the shapes and the dtypes, and changes nothing.
    """
    own = agent.state_dict()
    if unlike := own.keys() ^ weights.tensors.keys():
        return f"{min(unlike)} is on one side only"
    for name, tensor in own.items():
        theirs = weights.tensors[name]
        if theirs.shape != tensor.shape:
            return f"{name} is {tuple(theirs.shape)}, not {tuple(tensor.shape)}"
        if theirs.dtype != tensor.dtype:
            return f"{name} is {theirs.dtype}, not {tensor.dtype}"
    if weights.agent_digest != agent_digest(agent.hidden_size, agent.config):
        return "the agent settings differ"
    return None


def save_agent(agent: Agent, folder: Path, card: dict[str, Any]) -> None:
    """Write ``agent.safetensors`` and ``agent.json`` into ``folder``, which is made if missing.

    ``card`` is kept beside the shape of the network: the LLM, truncation, rewards and training that the
    agent belongs to. Each file appears whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in agent.state_dict().items()}
    with replacing(folder / WEIGHTS_FILE) as partial:
        save_file(tensors, partial)
    own = {
        "hidden_size": agent.hidden_size,
        "agent": agent.config.model_dump(mode="json"),
        "num_parameters": sum(t.numel() for t in tensors.values()),
        "dtype": str(tensors["ln.weight"].dtype).removeprefix("torch."),
    }
    _write_card(folder, {**own, **card, **own})  # A card that was loaded does not say what these weights are.


def seal_agent(folder: Path) -> None:
    """Add the SHA-256 of the weights, and of the critic's if there are any, to the card of the agent saved in
    ``folder``: from then on no others are taken.

    Not part of saving: a run replaces the files one after the other.
    """
    card = json.loads((folder / CARD_FILE).read_text())
    found = {key: _file_digest(folder / name) for name, key in DIGESTS.items() if (folder / name).is_file()}
    _write_card(folder, {**card, **found})


def _write_card(folder: Path, content: dict[str, Any]) -> None:
    write_whole(folder / CARD_FILE, json.dumps(content, indent=2) + "\n")


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(folder: Path, name: str, card: Mapping[str, Any]) -> None:
    """Raise UserError if the file ``name`` in ``folder`` is another than its ``card`` knows."""
    key = DIGESTS[name]
    if card.get(key, found := _file_digest(folder / name)) != found:
        raise UserError(
            f"agent: {folder / name} has SHA-256 {found[:12]}…, its card says {str(card[key])[:12]}…; "
            "fetch all its files again"
        )


def load_agent(folder: Path, hidden_size: int | None = None) -> tuple[Agent, dict[str, Any]]:
    """Return the agent saved in ``folder`` and its card.

    Raises:
        UserError: a file is missing or damaged, or the agent was trained for an LLM of another hidden
            size than ``hidden_size``.
    """
    for name in (WEIGHTS_FILE, CARD_FILE):
        if not (folder / name).is_file():
            raise UserError(f"agent: {folder / name} is missing; give a folder that `mara train` saved")
    try:
        card = json.loads((folder / CARD_FILE).read_text())
        config = AgentConfig.model_validate(card["agent"])
        if hidden_size is not None and card["hidden_size"] != hidden_size:
            raise UserError(
                f"agent: {folder} was trained for hidden size {card['hidden_size']}, the LLM has "
                f"{hidden_size}; use the LLM it was trained for ({card.get('llm', 'not recorded')})"
            )
        check_digest(folder, WEIGHTS_FILE, card)
        agent = Agent(card["hidden_size"], config)
        agent.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"agent: {folder} cannot be read ({reason}); save it again") from error
    if bad := not_finite(agent.state_dict()):
        raise UserError(f"agent: {folder / WEIGHTS_FILE}: {bad[0]} is not finite; train it again")
    return agent.eval(), card
