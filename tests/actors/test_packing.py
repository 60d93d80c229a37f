"""Packed linear layers compute what the layers did."""

import copy
import weakref

import pytest
import torch
from torch import nn

from mara.actors import packing
from mara.actors.packing import PackedLinear, pack_linears


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (2, 3, 24), (70, 24)])
def test_a_packed_layer_gives_the_same_for_any_number_of_rows(bias, shape):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    inputs = torch.randn(shape)
    torch.testing.assert_close(PackedLinear(linear)(inputs), linear(inputs), atol=1e-5, rtol=1e-5)


def test_a_packed_layer_takes_inputs_that_are_not_contiguous():
    linear = nn.Linear(6, 5).requires_grad_(False)
    inputs = torch.randn(6, 4, 3).permute(2, 1, 0)
    torch.testing.assert_close(PackedLinear(linear)(inputs), linear(inputs), atol=1e-5, rtol=1e-5)


def test_a_packed_model_gives_the_same_logits_and_generates_the_same(make_model):
    model = copy.deepcopy(make_model("llama")).float()
    packed = copy.deepcopy(model)
    assert pack_linears(packed) == 2 * 7 + 1
    ids = torch.tensor([[5, 9, 33, 4]])
    torch.testing.assert_close(packed(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    answers = [m.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0) for m in (model, packed)]
    assert answers[0].tolist() == answers[1].tolist()


def test_a_layer_that_cannot_be_packed_or_would_differ_stays_as_it_is(make_model, monkeypatch):
    model = copy.deepcopy(make_model("llama")).float()
    monkeypatch.setattr(packing, "TOLERANCE", {torch.float32: -1.0})
    assert pack_linears(model) == 0
    assert all(type(module) is not PackedLinear for module in model.modules())


def test_the_weights_of_a_packed_layer_can_still_be_read():
    linear = nn.Linear(24, 40).requires_grad_(False)
    assert torch.equal(PackedLinear(linear).weight, linear.weight)


def test_each_original_is_gone_before_the_next_layer_is_packed(make_model, monkeypatch):
    model = copy.deepcopy(make_model("llama")).float()
    packed: list[weakref.ref] = []
    alive: list[int] = []

    class Watching(PackedLinear):
        def __init__(self, linear):
            alive.append(sum(ref() is not None for ref in packed))
            packed.append(weakref.ref(linear))
            super().__init__(linear)

    monkeypatch.setattr(packing, "PackedLinear", Watching)
    assert pack_linears(model) == len(alive)
    assert max(alive) <= 1
