"""Tiny random language models, made on the fly."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 61
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)


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


@pytest.fixture(scope="session")
def llm_folder(llama, tmp_path_factory):
    """A tiny model on disk, whose tokens are letters."""
    letters = {letter: number for number, letter in enumerate("_^$abcdefghijklmnopqrstuvwxyz<>:? ")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="_", bos_token="^", eos_token="$", chat_template=TEMPLATE
    )
    path = tmp_path_factory.mktemp("llm")
    llama.save_pretrained(path)
    fast.save_pretrained(path)
    return path
