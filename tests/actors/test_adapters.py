"""What is wrong with an adapter is found before a model is loaded."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tokenizers import processors

from mara.actors.adapters import check_adapter, load_adapted
from mara.actors.config import LLMConfig
from mara.common.errors import UserError


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    return tmp_path


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_a_part_of_an_adapter_is_refused(adapter, missing):
    (adapter / missing).unlink()
    with pytest.raises(UserError, match=rf"systems\.dpo\.adapter: .* has no {missing}; give"):
        check_adapter(adapter, "systems.dpo.adapter")


def test_without_peft_an_adapter_is_refused(adapter, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"systems\.dpo\.adapter=.* needs the package peft; .* -m pip install .*adapters"
    ):
        check_adapter(adapter, "systems.dpo.adapter")


def test_an_adapter_that_cannot_be_merged_is_one_line(adapter, llm_folder):
    config = LLMConfig(model=str(llm_folder), dtype="float32", device="cpu")
    with pytest.raises(
        UserError, match=rf"^adapter: {adapter} cannot be merged into {llm_folder} \([^\n]+\); give"
    ):
        load_adapted(config, adapter)


def test_an_llm_with_an_adapter_is_asked_as_the_one_without(adapter, llm_folder, monkeypatch):
    class PeftModel:
        """An adapter that changes nothing."""

        def __init__(self, model):
            self.merge_and_unload = lambda: model

        @staticmethod
        def from_pretrained(model, folder):
            assert folder == str(adapter)
            return PeftModel(model)

    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace(PeftModel=PeftModel))
    config = LLMConfig(
        model=str(llm_folder), dtype="float32", device="cpu", doubled_bos=True, system_prompt="be good"
    )
    llm = load_adapted(config, adapter)
    llm.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="^ $A", special_tokens=[("^", 1)]
    )
    once = replace(llm, doubled_bos=False).render("why")
    assert llm.render("why") == [1, *once]
    assert llm.tokenizer.decode(once).replace(" ", "").startswith("<system>begood")
