"""The agents that the paper's authors released, read from their ``.pth`` files.

Such a file is what ``torch.save`` makes of the network's state dict: LayerNorm ``ln``, then ``linear1``,
``linear2`` and ``output_linear`` with ReLU between them (section 3.2). Output 1 accepts, so the tensors are
those of :class:`~mara.common.agent.Agent` as they stand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mara.common.agent import Agent
from mara.common.config import AgentConfig
from mara.common.errors import UserError

NAMES = frozenset(
    f"{layer}.{part}"
    for layer in ("ln", "linear1", "linear2", "output_linear")
    for part in ("weight", "bias")
)
"""What the state dict holds, no more and no less."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WRAPPER = "module."
"""What torch's parallel wrappers put before every name."""


def read_released_agent(path: Path) -> Agent:
    """The agent in ``path``, in float32 on the CPU, with the widths that its tensors have.

    The state dict may be the value of one key, and all of its names may begin with ``module.``. Pickled
    objects other than tensors and plain containers are never made.

    Raises:
        UserError: the file cannot be read, holds other objects, layers or shapes, or values that are no
            finite floating-point numbers.
    """
    tensors = _state_dict(_load(path), path)
    if missing := sorted(NAMES - tensors.keys()):
        raise _refusal(path, f"lacks {', '.join(missing)}", "give the state dict of an accept-reject network")
    if unknown := sorted(str(name) for name in tensors.keys() - NAMES):
        raise _refusal(
            path,
            f"has {unknown[0][:80]!r}, which the network has not",
            "give the state dict of an accept-reject network",
        )
    converted = {name: _float32(tensors[name], name, path) for name in sorted(NAMES)}
    agent = _sized(converted, path)
    agent.load_state_dict(converted)
    return agent.eval()


def _refusal(path: Path, what: str, remedy: str) -> UserError:
    return UserError(f"import: {path} {what}; {remedy}")


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror or error})", "give a .pth file") from error
    except Exception as error:
        # Damaged files fail with whatever error the reader comes upon; what it will not make, it names.
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _refusal(
                path,
                f"holds pickled objects ({found[1]}), which may run any code",
                "save the network's state_dict() alone",
            ) from error
        raise _refusal(path, "is damaged, or no file that torch.save wrote", "fetch it again") from error


def _state_dict(content: Any, path: Path) -> Mapping[Any, Any]:
    """The one state dict in ``content``: itself, or the value of one key."""
    remedy = "save the state_dict() of the agent alone"
    if not isinstance(content, Mapping):
        raise _refusal(path, f"holds a {type(content).__name__}, not a state dict", remedy)
    if _has_tensors(content):
        return _unwrapped(content)
    nested = {key: _unwrapped(value) for key, value in content.items() if _has_tensors(value)}
    fitting = [key for key, value in nested.items() if value.keys() == NAMES]
    chosen = fitting or list(nested)
    if not chosen:
        raise _refusal(path, "holds no state dict", remedy)
    if len(chosen) > 1:
        raise _refusal(path, f"holds several state dicts ({', '.join(map(str, chosen))})", remedy)
    return nested[chosen[0]]


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, torch.Tensor) for entry in value.values())


def _unwrapped(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    if all(isinstance(name, str) and name.startswith(WRAPPER) for name in state):
        return {name.removeprefix(WRAPPER): value for name, value in state.items()}
    return state


def _float32(tensor: Any, name: str, path: Path) -> torch.Tensor:
    remedy = "give a file with floating-point weights"
    if not isinstance(tensor, torch.Tensor):
        raise _refusal(path, f"has a {type(tensor).__name__} for {name}", remedy)
    if tensor.dtype not in DTYPES:
        raise _refusal(path, f"has {name} in {tensor.dtype}", remedy)
    # A few bytes can claim to be a tensor of any size, by repeating them.
    if (
        tensor.layout is not torch.strided
        or tensor.device.type != "cpu"
        or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ):
        raise _refusal(path, f"has {name} without all of its values", remedy)
    converted = tensor.detach().float().contiguous()
    if not converted.isfinite().all():
        raise _refusal(path, f"has values in {name} that are not finite", "fetch it again")
    return converted


def _sized(tensors: Mapping[str, torch.Tensor], path: Path) -> Agent:
    """A new agent of the sizes that ``tensors`` have."""
    sizes = []
    for name in ("ln.bias", "linear1.bias", "linear2.bias"):
        if tensors[name].dim() != 1 or not len(tensors[name]):
            raise _refusal(
                path, f"has {name} of shape {tuple(tensors[name].shape)}", "it must be a row of numbers"
            )
        sizes.append(len(tensors[name]))
    hidden_size, first, second = sizes
    expected = {
        "ln": (hidden_size,),
        "linear1": (first, hidden_size),
        "linear2": (second, first),
        "output_linear": (2, second),
    }
    for layer, shape in expected.items():
        for name, wanted in ((f"{layer}.weight", shape), (f"{layer}.bias", shape[:1])):
            if (found := tuple(tensors[name].shape)) != wanted:
                raise _refusal(
                    path, f"has {name} of shape {found}, the other layers ask for {wanted}", "fetch it again"
                )
    return Agent(hidden_size, AgentConfig(widths=(first, second)))
