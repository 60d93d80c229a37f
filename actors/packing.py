"""Linear layers for the CPU, their weights arranged once as oneDNN's kernels read them.

torch's own linear layer is slow in float32 when a batch has few rows, as if it arranged the weights anew in
every call: on two cores without AVX-512 a forward pass of SmolLM2 in float32 over four candidates takes 91
ms so and 60 ms packed (one candidate 73 and 65 ms, sixteen rows 115 and 89 ms). The operators are those
that torch's own compiler emits.

Legend: B rows in all, I inputs, O outputs.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)

ROWS_HINT = 16
"""Rows that the arrangement is chosen for; it is right for any number."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Number formats that are packed, and the largest relative difference to the layer as it was."""


class PackedLinear(nn.Module):
    """A linear layer for inference that keeps only the packed form of its weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # Not a buffer: it has no layout that could be copied, moved or saved.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_HINT)

    @property
    def weight(self) -> torch.Tensor:
        """The weights [O, I], unpacked anew each time: for code that looks at them, not for arithmetic."""
        weights: torch.Tensor = self._weight.to_dense()
        return weights

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., I] → [..., O]."""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._weight, self.bias, "none", [], ""
        )
        return found


@torch.inference_mode()
def pack_linears(model: nn.Module) -> int:
    """Replace the linear layers of ``model``, which is on the CPU, by packed ones; return how many.

    A layer stays as it is where this build of torch or this processor cannot pack it, or where the packed one
    gives other results on random inputs. The model can then be neither copied, moved nor saved.
    """
    num_packed = 0
    # By name: a list of the layers would keep all originals alive, and two copies of them need not fit.
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if linear.weight.dtype not in TOLERANCE:
            continue
        try:
            packed = PackedLinear(linear)
            _check(linear, packed)
        except (RuntimeError, AttributeError) as error:
            logger.info("%s is not packed: %s", name, str(error).splitlines()[0])
            continue
        setattr(model.get_submodule(parent), child, packed)
        num_packed += 1
    return num_packed


def is_packed(model: nn.Module) -> bool:
    """Whether some layer of ``model`` is packed."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _check(plain: nn.Linear, packed: PackedLinear) -> None:
    """Compare the two layers on random inputs of three rows.

    Raises:
        RuntimeError: they differ.
    """
    draws = torch.Generator().manual_seed(0)
    inputs_BI = torch.randn(3, plain.in_features, generator=draws).to(plain.weight.dtype)
    expected_BO, found_BO = plain(inputs_BI).float(), packed(inputs_BI).float()
    difference = float((found_BO - expected_BO).norm() / expected_BO.norm().clamp(min=1e-12))
    if not difference <= TOLERANCE[plain.weight.dtype]:
        raise RuntimeError(f"a packed linear layer differs by {difference:.2g}")
