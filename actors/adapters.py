"""PEFT adapters, merged into the LLM that they were trained for."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path

from mara.actors import packing
from mara.actors.config import LLMConfig
from mara.actors.llm import LLM, load_llm
from mara.common.errors import UserError
from mara.common.extras import install_extra

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def check_adapter(folder: Path, field: str) -> None:
    """``folder`` holds a PEFT adapter, and the package that reads it is installed.

    Args:
        field: the setting that names the folder, for messages.

    Raises:
        UserError: one of them is missing.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{field}: {folder} has no {ADAPTER_CONFIG}; give the folder of a PEFT adapter")
    if not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise UserError(f"{field}: {folder} has no {ADAPTER_WEIGHTS[0]}; give a complete adapter")
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            f"{field}={folder} needs the package peft; {install_extra('adapters')}, or merge the adapter "
            "into its model and give that"
        )


def load_adapted(config: LLMConfig, adapter: Path | None, pack: bool = True) -> LLM:
    """Load the LLM as :func:`~mara.actors.llm.load_llm` does, with the adapter merged into its weights.

    Raises:
        UserError: the model or the adapter cannot be read, or they do not fit each other.
    """
    if adapter is None:
        return load_llm(config, pack)
    llm = load_llm(config, pack=False)
    try:
        peft = importlib.import_module("peft")
        model = peft.PeftModel.from_pretrained(llm.model, str(adapter)).merge_and_unload()
    except Exception as error:
        # A damaged file, another model and a missing package each fail with errors of their own.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"adapter: {adapter} cannot be merged into {config.model} ({reason}); "
            "give the model it was trained for"
        ) from error
    model.eval().requires_grad_(False)
    if pack and llm.device.type == "cpu" and llm.dtype in packing.TOLERANCE:
        packing.pack_linears(model)
    return replace(llm, model=model)
