"""Everything that can be wrong with a run, found before a model is loaded or a process started."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mara.actors.heads import load_head
from mara.actors.prompts import Prompt, load_prompts
from mara.buffer.connection import check_memory, connect
from mara.common.errors import UserError
from mara.deploy.config import RunConfig
from mara.deploy.model_shape import find_hidden_size
from mara.learner.loop import check_start, learner_device


@dataclass(frozen=True, slots=True)
class Checked:
    """What the checks found out on the way."""

    prompts: tuple[Prompt, ...]
    """Prompts to train on."""
    hidden_size: int
    """Of the LLM."""


def preflight(config: RunConfig, say: Callable[[str], None] = lambda _what: None) -> Checked:
    """Check files, devices, the server and the models' sizes. Takes seconds; ``say`` is told what is next.

    Raises:
        UserError: the first thing that is wrong: field, value, remedy.
    """
    say("checking folders and prompts")
    check_writable("run.dir", config.run.dir)
    prompts = load_prompts(config.prompts.train)
    if config.prompts.evaluation is not None:
        load_prompts(config.prompts.evaluation)
    check_start(config.learner, config.replay, config.shaping)
    say("checking devices")
    check_devices(config)
    if config.replay.redis_url is not None:
        say("checking the server")
        check_server(config)
    say("checking the LLM and the reward heads")
    hidden_size = find_hidden_size(config.llm)
    for name, head in config.rewards.items():
        check_head(name, head.path, hidden_size)
    return Checked(tuple(prompts), hidden_size)


def check_server(config: RunConfig) -> None:
    """The server that ``replay.redis_url`` names answers, and keeps what a run of this size stores."""
    replay = config.replay
    assert replay.redis_url is not None
    with connect(replay.redis_url, replay.connect_timeout_s) as client:
        check_memory(client, replay.redis_url, replay.store_max_bytes(config.rollout.num_actors))


def check_writable(field: str, folder: Path) -> None:
    """The folder that ``field`` names can be made and written."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{field}={folder}: {existing} is not a folder that can be written; choose another")


def check_devices(config: RunConfig) -> None:
    """The devices have names torch knows and, where everything runs on this machine, exist."""
    for field, name in (("llm.device", config.llm.device), ("learner.device", config.learner.device)):
        if name == "auto":
            continue
        try:
            torch.device(name)
        except RuntimeError as error:
            raise UserError(f"{field}={name} is not a device; use auto, cpu, cuda or cuda:N") from error
    if config.ray.address is not None:
        return
    learner_device(config.learner.device)
    num_gpus = torch.cuda.device_count()
    if torch.device("cpu" if config.llm.device == "auto" else config.llm.device).type == "cuda":
        if num_gpus == 0:
            raise UserError(f"llm.device={config.llm.device}: there is no GPU here; use auto or cpu")
        if config.rollout.num_gpus == 0:
            raise UserError(
                f"llm.device={config.llm.device} needs a GPU for each rollout actor, rollout.num_gpus is 0; "
                "give each a part of one, such as 0.5"
            )
    if config.rollout.num_actors * config.rollout.num_gpus > num_gpus:
        raise UserError(
            f"rollout.num_gpus={config.rollout.num_gpus:g} for {config.rollout.num_actors} actors is more "
            f"than the {num_gpus} GPUs here; lower it or rollout.num_actors"
        )


def check_head(name: str, path: Path, hidden_size: int) -> None:
    """The reward head can be read and fits the LLM."""
    try:
        load_head(path, hidden_size)
    except UserError as error:
        raise UserError(f"rewards.{name}.path: {error}") from error
