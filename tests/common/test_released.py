"""The authors' files: the same probabilities as their layers give, and nothing else that a file may hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mara.common.agent import ACCEPT, REJECT
from mara.common.errors import UserError
from mara.common.released import read_released_agent

D, FIRST, SECOND = 12, 7, 5


def released(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A state dict with the layers' names, of sizes that are all different."""
    shapes = {"ln": (D,), "linear1": (FIRST, D), "linear2": (SECOND, FIRST), "output_linear": (2, SECOND)}
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, shape in shapes.items():
        tensors[f"{layer}.weight"] = (0.5 * torch.randn(shape, generator=random)).to(dtype)
        tensors[f"{layer}.bias"] = (0.1 * torch.randn(shape[:1], generator=random)).to(dtype)
    return tensors


def accept_probability(state: np.ndarray, tensors: dict[str, torch.Tensor]) -> float:
    """The layers of section 3.2, written out in float64: output 1 accepts."""
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    x = (state - state.mean()) / np.sqrt(((state - state.mean()) ** 2).mean() + 1e-5)
    x = x * w["ln.weight"] + w["ln.bias"]
    for layer in ("linear1", "linear2"):
        x = w[f"{layer}.weight"] @ x + w[f"{layer}.bias"]
        x = np.where(x > 0, x, 0)
    z = np.exp(w["output_linear.weight"] @ x + w["output_linear.bias"])
    return float(z[1] / (z[0] + z[1]))


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_an_imported_agent_accepts_with_the_probability_that_the_layers_give(tmp_path, dtype):
    tensors = released(dtype)
    agent = read_released_agent(write(tmp_path / "a.pth", tensors))
    assert agent.config.widths == (FIRST, SECOND)
    assert all(tensor.dtype == torch.float32 for tensor in agent.state_dict().values())
    states = torch.randn(40, D, generator=torch.Generator().manual_seed(1)) * 3 + 1
    found = agent(states).exp().detach().double().numpy()
    expected = [accept_probability(state, tensors) for state in states.double().numpy()]
    assert max(expected) - min(expected) > 0.2
    np.testing.assert_allclose(found[:, ACCEPT], expected, atol=1e-5)
    np.testing.assert_allclose(found[:, REJECT], 1 - np.array(expected), atol=1e-5)


def wrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "arrange",
    [
        wrapped,
        lambda tensors: {"model": tensors, "epoch": 3},
        lambda tensors: {"state_dict": wrapped(tensors)},
        lambda tensors: {"actor": tensors, "critic": {"q.weight": torch.zeros(3)}},
    ],
)
def test_wrappers_that_leave_no_doubt_are_taken_off(tmp_path, arrange):
    tensors = released()
    agent = read_released_agent(write(tmp_path / "a.pth", arrange(tensors)))
    for name, tensor in agent.state_dict().items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0)


class Harmful:
    """Would run a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch made_by_pickle",)


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in released().items() if key != name}


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: {**released(), "x": Harmful()}, "pickled objects .*system"),
    (lambda: torch.nn.Linear(2, 2), "pickled objects"),
    (lambda: [torch.zeros(2)], "holds a list, not a state dict"),
    (lambda: {"epoch": 3}, "holds no state dict"),
    (lambda: {"one": released(), "other": released()}, r"several state dicts \(one, other\)"),
    (lambda: {"deep": {"deeper": released()}}, "holds no state dict"),
    (lambda: without("linear2.bias"), r"lacks linear2\.bias"),
    (lambda: {**released(), "linear3.weight": torch.zeros(2)}, r"has 'linear3\.weight'"),
    (lambda: {**released(), "epoch": 3}, "has 'epoch'"),
    (lambda: {**released(), 5: torch.zeros(2)}, "has '5'"),
    (lambda: {**without("ln.bias"), "module.ln.bias": torch.zeros(D)}, r"lacks ln\.bias"),
    (lambda: {**released(), "ln.bias": 5}, r"has a int for ln\.bias"),
    (lambda: {**released(), "ln.weight": torch.zeros(D + 1)}, r"ln\.weight of shape \(13,\).*\(12,\)"),
    (lambda: {**released(), "ln.bias": torch.zeros(0)}, r"ln\.bias of shape \(0,\)"),
    (lambda: {**released(), "linear1.weight": torch.zeros(D, FIRST)}, r"linear1\.weight of shape \(12, 7\)"),
    (
        lambda: {**released(), "output_linear.weight": torch.zeros(3, SECOND)},
        r"output_linear\.weight of shape",
    ),
    (lambda: {**released(), "output_linear.bias": torch.zeros(3)}, r"output_linear\.bias of shape \(3,\)"),
    (lambda: {**released(), "linear1.bias": torch.full((FIRST,), torch.nan)}, r"linear1\.bias .*not finite"),
    (
        lambda: {**released(torch.float64), "ln.bias": torch.full((D,), 1e300, dtype=torch.float64)},
        "not finite",
    ),
    (lambda: {**released(), "linear1.bias": torch.zeros(FIRST, dtype=torch.int8)}, r"torch\.int8"),
    (lambda: {**released(), "linear1.bias": torch.zeros(FIRST, dtype=torch.complex64)}, r"torch\.complex64"),
    (lambda: {**released(), "ln.bias": torch.zeros(D).to_sparse()}, r"ln\.bias without all of its values"),
    (lambda: {**released(), "ln.bias": torch.zeros(1).expand(D)}, r"ln\.bias without all of its values"),
    (lambda: {**released(), "ln.bias": torch.zeros(D, device="meta")}, r"ln\.bias"),
]


@pytest.mark.parametrize(("content", "reason"), REFUSED)
def test_anything_else_is_refused_in_one_line(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.pth", content())
    with pytest.raises(UserError, match=reason) as caught:
        read_released_agent(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "made_by_pickle").exists()


@pytest.mark.parametrize("content", [b"", b"not torch at all", b"PK\x03\x04 half an archive"])
def test_a_file_that_torch_did_not_write_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pth is ") as caught:
        read_released_agent(path)
    assert "\n" not in str(caught.value)
    whole = write(tmp_path / "whole.pth", released()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.pth is "):
        read_released_agent(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match=r"a\.pth cannot be read \(No such file"):
        read_released_agent(tmp_path / "a.pth")
