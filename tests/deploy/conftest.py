"""Run configurations whose files exist but whose models are never loaded, and the folder of a tiny run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mara.actors.head_config import HeadShape
from mara.actors.heads import RewardHead, save_head
from mara.common.agent import Agent, save_agent
from mara.common.config import AgentConfig
from mara.common.critic import TwinCritic, save_critic
from mara.deploy.agent_card import agent_card
from mara.deploy.config import RunConfig
from mara.deploy.config_file import dump_config, load_config
from mara.deploy.preflight import preflight
from mara.deploy.run_folder import CONFIG_FILE
from mara.learner.saving import AGENT_FOLDER


@pytest.fixture
def config_path(tmp_path: Path, llm_folder: Path) -> Path:
    """A configuration of a model that is described but has no usable weights."""
    llm = tmp_path / "llm"
    llm.mkdir()
    for part in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(llm_folder / part, llm / part)
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


@pytest.fixture
def tiny_run(tmp_path: Path, llm_folder: Path) -> tuple[Path, RunConfig]:
    """A run folder with a random agent and critic, and its configuration."""
    for seed, name in enumerate(("helpful", "cost")):
        head = RewardHead(HeadShape(hidden_size=32, width=8)).requires_grad_(False)
        for parameter in head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
        save_head(tmp_path / name, head, {})
    for name, prompts in {"train": ["go"], "held_out": ["why", "how so", "what", "never asked"]}.items():
        lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "tiny.yaml").write_text(
        f"llm: {{model: {llm_folder}, dtype: float32, device: cpu}}\n"
        "prompts: {train: train.jsonl, evaluation: held_out.jsonl}\n"
        "rewards: {helpful: {path: helpful, weight: 1.0}, cost: {path: cost, weight: -0.5}}\n"
        "decoding: {max_new_tokens: 4, truncation: {top_k: 4}}\n"
        "rollout: {max_prompt_tokens: 30}\n"
        "evaluation: {num_prompts: 3, rows: 2, num_samples: 1}\n"
    )
    folder = tmp_path / "run"
    torch.manual_seed(0)
    agent = Agent(32, AgentConfig(widths=(16, 8)))
    torch.nn.init.normal_(agent.output_linear.weight, std=4.0)
    critic = TwinCritic(32, (16, 8))
    torch.nn.init.normal_(critic.output_linear.weight_HIO, std=4.0)
    save_critic(critic, folder / AGENT_FOLDER)
    config = load_config(tmp_path / "tiny.yaml")
    card = agent_card(config, preflight(config), "run-1")
    training = {"gradient_steps": 40, "policy_steps": 30, "episodes": 20, "complete": True}
    save_agent(agent, folder / AGENT_FOLDER, {**card, "training": training})
    (folder / CONFIG_FILE).write_text(dump_config(config))
    return folder, config
