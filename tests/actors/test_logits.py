"""Logits made from hidden states, against those of the model's own forward pass."""

import copy

import pytest
import torch

from mara.actors.decoding.logits import make_logit_head
from mara.actors.llm import LLM
from mara.common.errors import UserError

IDS = torch.tensor([[5, 6, 7, 8, 9], [17, 3, 60, 4, 4]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "granite", "cohere"])
def test_logits_are_those_of_the_model(make_model, family, dtype):
    llm = LLM(make_model(family, dtype=dtype), tokenizer=None, name=family)
    states = llm.model.base_model(IDS).last_hidden_state
    found = llm.logit_head(states)
    assert found.dtype == dtype
    assert torch.equal(found, llm.model(IDS).logits)
    if family in ("gemma2", "granite", "cohere"):
        assert not torch.equal(found, llm.model.lm_head(states))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits_soft_cap", 30.0),
        ("output_logit_soft_cap", 30.0),
        ("lm_head_multiplier", 0.5),
        ("output_multiplier", 0.2),
        ("logits_mup_width_multiplier", 24.0),
        ("logit_scale", 0.0625),
        ("logit_scale", "inv_sqrt_d_model"),
        ("logits_scaling", 8.0),
        ("final_logit_softcapping", 30.0),
    ],
)
def test_a_setting_whose_meaning_is_not_known_is_refused_by_name(llama, name, value):
    model = copy.deepcopy(llama)
    setattr(model.config, name, value)
    with pytest.raises(UserError, match=f"llm.model: llama has {name}={value!r}") as caught:
        make_logit_head(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lm_head_multiplier", 1.0),
        ("logits_scaling", 1),
        ("final_logit_softcapping", None),
        ("attn_logit_softcapping", 50.0),
        ("output_router_logits", True),
        ("num_logits_to_keep", 5),
    ],
)
def test_settings_that_change_no_logit_are_let_be(llama, name, value):
    model = copy.deepcopy(llama)
    setattr(model.config, name, value)
    states = model.base_model(IDS).last_hidden_state
    assert torch.equal(make_logit_head(model)(states), llama(IDS).logits)
