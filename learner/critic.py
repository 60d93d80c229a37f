"""The critic: two heads that value accepting and rejecting a candidate (section 3.3).

Legend: B rows, D hidden size of the LLM, H the two heads, F units of a layer, I inputs, O outputs.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from mara.common.agent import full_precision, normalised_linear

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
