"""Tiny random language models, made on the fly."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61


def make_llama(
    seed: int = 0, attention: str = "sdpa", dtype: torch.dtype = torch.float64
) -> LlamaForCausalLM:
    """A random two-layer Llama with grouped heads, whose distributions are neither flat nor certain."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=2,
        attn_implementation=attention,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    model.generation_config.eos_token_id = 2
    return model


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    """Float64, so that two ways of computing the same thing agree to the last token."""
    return make_llama()


@pytest.fixture(scope="session")
def eager_llama() -> LlamaForCausalLM:
    """The same weights, with attention that adds its mask."""
    return make_llama(attention="eager")
