"""Run configurations whose files exist but whose models are never loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mara.deploy.config import RunConfig
from mara.deploy.config_file import load_config


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    """A configuration of a model that is described but has no usable weights."""
    llm = tmp_path / "llm"
    llm.mkdir()
    (llm / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32}))
    save_file({}, llm / "model.safetensors")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "why?"}\n{"prompt": "how?"}\n')
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"llm: {{model: {llm}, device: cpu}}\n"
        "prompts: {train: prompts.jsonl}\n"
        "rewards: {helpful: {path: helpful, weight: 1.0}}\n"
        "learner: {device: cpu, batch_size: 8, start_batches: 1}\n"
        f"run: {{dir: {tmp_path / 'runs'}}}\n"
    )
    return path


@pytest.fixture
def config(config_path: Path) -> RunConfig:
    return load_config(config_path)
