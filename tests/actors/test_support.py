"""Models that the engine cannot drive are refused at once, by name."""

import copy

import pytest
import torch
import transformers
from torch import nn

from mara.actors.decoding.slots import SlotCache, probe_key_shape
from mara.actors.decoding.support import check_supported, self_check
from mara.common.errors import UserError


class Shifted(nn.Module):
    """Rotary positions that begin at 0 in every pass: right without a cache, wrong with one."""

    def __init__(self, rotary):
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden_states, position_ids):
        return self.rotary(hidden_states, position_ids - position_ids.min())


def test_a_model_that_loses_its_positions_in_the_cache_is_refused_with_the_difference(llama):
    model = copy.deepcopy(llama)
    self_check(model, 20)
    model = copy.deepcopy(llama)
    model.model.rotary_emb = Shifted(model.model.rotary_emb)
    with pytest.raises(UserError, match=r"llama computes other states .* difference 0\.\d+, allowed 0\.0001"):
        self_check(model, 20)


def test_a_model_that_ignores_the_mask_is_refused(llama):
    model = copy.deepcopy(llama)
    inner = model.model.forward
    model.model.forward = lambda **given: inner(**given | {"attention_mask": None})
    with pytest.raises(UserError, match=r"^llm\.model: llama c"):
        self_check(model, 20)


def test_a_model_whose_logits_are_not_those_of_its_output_embedding_is_refused(llama):
    model = copy.deepcopy(llama)
    model.lm_head.register_forward_hook(lambda module, given, found: found)
    inner = model.forward

    def doubled(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    with pytest.raises(UserError, match="llama computes other states"):
        self_check(model, 20)


def test_a_model_without_keys_and_values_is_refused_by_name():
    config = transformers.MambaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4, intermediate_size=48
    )
    model = transformers.MambaForCausalLM(config).eval()
    with pytest.raises(UserError, match=r"^llm\.model: .*mamba"):
        self_check(model, 20)


def test_the_cache_takes_the_layers_own_shapes_and_says_what_a_token_costs(make_model):
    layers, shape, dtype = probe_key_shape(make_model("qwen3"))
    assert (layers, tuple(shape), dtype) == (2, (2, 16, 16), torch.float64)
    cache = SlotCache(make_model("gpt2"), num_rows=3, num_slots=5)
    assert cache.nbytes_per_token == 2 * 4 * (8 + 8) * 8
    assert cache.nbytes == 3 * 5 * cache.nbytes_per_token
    assert cache.nbytes == sum(t.numel() * t.element_size() for t in (cache.keys_LRHSE, cache.values_LRHSE))


def test_states_that_are_not_numbers_are_refused(llama):
    model = copy.deepcopy(llama)
    inner = model.model.forward

    def broken_with_a_mask(**given):
        output = inner(**given)
        if given.get("attention_mask") is not None:
            output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    model.model.forward = broken_with_a_mask
    with pytest.raises(UserError, match="relative difference nan"):
        self_check(model, 20)


def test_a_window_longer_than_the_usual_check_is_checked_where_rows_may_be_longer_still(llama):
    """The model forgets what is 30 tokens back, and says so by a setting of its own."""
    model = copy.deepcopy(llama)
    model.config.memory_window = 30
    inner = model.model.forward

    def forgetful(**given):
        mask = given.get("attention_mask")
        if mask is not None and mask.ndim == 4 and mask.shape[-1] > 30:
            mask = mask.clone()
            mask[..., : mask.shape[-1] - 30] = False
            given["attention_mask"] = mask
        return inner(**given)

    model.model.forward = forgetful
    self_check(model, 30)
    with pytest.raises(UserError, match="computes other states"):
        self_check(model, 31)


def test_local_attention_that_counts_from_the_end_of_the_cache_is_refused():
    config = transformers.GPTNeoConfig(
        vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    with pytest.raises(UserError, match="gpt_neo has local attention"):
        check_supported(transformers.GPTNeoForCausalLM(config), 20)


def test_positions_that_depend_on_the_longest_row_are_refused_beyond_the_length_where_they_change():
    config = transformers.Phi3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    )
    model = transformers.Phi3ForCausalLM(config)
    check_supported(model, 16)
    with pytest.raises(UserError, match="phi3 turns its positions otherwise .* more than 16 tokens"):
        check_supported(model, 17)
