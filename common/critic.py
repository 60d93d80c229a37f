"""The critic: two heads that value accepting and rejecting a candidate (section 3.3), and its file.

Legend: B rows, D hidden size of the LLM, H the two heads, F units of a layer, I inputs, O outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mara.common.agent import (
    CARD_FILE,
    CRITIC_FILE,
    DIGESTS,
    WEIGHTS_FILE,
    check_digest,
    full_precision,
    normalised_linear,
    not_finite,
)
from mara.common.errors import UserError
from mara.common.files import replacing

NUM_HEADS = 2
NUM_ACTIONS = 2


class TwinCritic(nn.Module):
    """One LayerNorm, then two independent heads Linear → ReLU → Linear → ReLU → Linear 2.

    The paper's V1 and V2. The heads lie side by side in stacked weights: the first layer of both is one
    matrix product, the others one batched product each.
    """

    def __init__(self, hidden_size: int, widths: tuple[int, int]) -> None:
        super().__init__()
        first, second = widths
        self.widths = widths
        self.ln = nn.LayerNorm(hidden_size)
        self.linear1 = nn.Linear(hidden_size, NUM_HEADS * first)
        self.linear2 = _HeadsLinear(first, second)
        self.output_linear = _HeadsLinear(second, NUM_ACTIONS)
        # Small last layer: an untrained critic prefers neither action, rather than one drawn by the seed.
        with torch.no_grad():
            self.output_linear.weight_HIO.mul_(0.01)
            self.output_linear.bias_H1O.zero_()

    def forward(self, states_BD: torch.Tensor) -> torch.Tensor:
        """Return float32 [2, B, 2]: head, row, action (0 rejects, 1 accepts).

        ``states_BD`` may have any float dtype; the arithmetic is in that of the weights.
        """
        x = torch.relu(normalised_linear(states_BD, self.ln, self.linear1))
        x_BHF = x.view(len(x), NUM_HEADS, -1)
        x_HBF = torch.relu(self.linear2(x_BHF.transpose(0, 1)))
        return full_precision(self.output_linear, x_HBF).float()


class _HeadsLinear(nn.Module):
    """One linear layer for each head, initialised as :class:`torch.nn.Linear` is.

    Weights [2, inputs, outputs] and biases [2, 1, outputs].
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(num_inputs)
        self.weight_HIO = nn.Parameter(
            torch.empty(NUM_HEADS, num_inputs, num_outputs).uniform_(-bound, bound)
        )
        self.bias_H1O = nn.Parameter(torch.empty(NUM_HEADS, 1, num_outputs).uniform_(-bound, bound))

    def forward(self, x_HBI: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias_H1O, x_HBI, self.weight_HIO)


def save_critic(critic: TwinCritic, folder: Path) -> None:
    """Write ``critic.safetensors`` beside the agent in ``folder``. It appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in critic.state_dict().items()}
    with replacing(folder / CRITIC_FILE) as partial:
        save_file(tensors, partial)


def _read_card(folder: Path) -> dict[str, Any]:
    """The agent's card; empty where it cannot be read, of which its own loading tells."""
    try:
        card = json.loads((folder / CARD_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def has_critic(folder: Path) -> bool:
    """Whether the agent in ``folder`` has a critic. What lies beside an agent whose card was sealed without
    one is another agent's."""
    return (folder / CRITIC_FILE).is_file() and not _is_sealed_without(_read_card(folder))


def _is_sealed_without(card: Mapping[str, Any]) -> bool:
    return DIGESTS[WEIGHTS_FILE] in card and DIGESTS[CRITIC_FILE] not in card


def load_critic(
    folder: Path, hidden_size: int | None = None, setting: str = "decoding.steering"
) -> TwinCritic:
    """Return the critic saved beside the agent in ``folder``; ``setting`` is what asks for it.

    Raises:
        UserError: there is none, it is damaged or not the one that the agent's card names, or it was trained
            for an LLM of another hidden size than ``hidden_size``.
    """
    path, card = folder / CRITIC_FILE, _read_card(folder)
    remedy = f"add {setting}=policy, or export or train the agent again"
    if path.is_file() and _is_sealed_without(card):
        raise UserError(
            f"{setting}=value needs the agent's critic, and {path} is another agent's: the card knows of "
            f"none; {remedy}"
        )
    if not path.exists():
        raise UserError(f"{setting}=value needs the agent's critic, and there is none in {folder}; {remedy}")
    try:
        with path.open("rb"):  # The library says of every such failure that there is no file.
            pass
    except OSError as error:
        raise UserError(f"agent: {path}: {error.strerror or error}; make it readable") from error
    without = (
        f"train it again, or add {setting}=policy (export and calibrate do without once the file is removed)"
    )
    try:
        tensors = load_file(path)
        _, first, second = tensors["linear2.weight_HIO"].shape
        critic = TwinCritic(len(tensors["ln.weight"]), (first, second))
        critic.load_state_dict(tensors)
        check_digest(folder, CRITIC_FILE, card)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        ArithmeticError,
        SafetensorError,
    ) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"agent: {path} cannot be read ({reason}); {without}") from error
    if hidden_size is not None and len(critic.ln.weight) != hidden_size:
        raise UserError(
            f"agent: {path} was trained for hidden size {len(critic.ln.weight)}, the LLM has {hidden_size}; "
            "use the LLM it was trained for"
        )
    if bad := not_finite(critic.state_dict()):
        raise UserError(f"agent: {path}: {bad[0]} is not finite; {without}")
    return critic.eval()
