"""Everything that can be wrong with a run, found before a model is loaded or a process started."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mara.actors.config import LLMConfig
from mara.actors.heads import RewardHead, head_digests, load_head, read_base_scores, read_head_llm
from mara.actors.llm import cache_folder, check_quantization, locate_model, resolve_device, resolve_dtype
from mara.actors.prompts import Prompt
from mara.actors.reward_models.config import CheckpointConfig
from mara.buffer.connection import check_stores
from mara.common.errors import UserError
from mara.deploy.config import AgentUse, RunConfig, is_of_hub
from mara.deploy.console import warn
from mara.deploy.finished_run import FinishedLog, find_log, warn_of_forced
from mara.deploy.hub import digest_of, load_source
from mara.deploy.model_shape import (
    LLMIdentity,
    check_llm_template,
    find_digest,
    find_hidden_size,
    find_identity,
    find_num_positions,
    is_same_llm,
)
from mara.deploy.recorder import check_wandb, wandb_mode
from mara.deploy.reward_models import check_reward_model
from mara.learner.loop import check_start, learner_device

CROWDED = 2
"""Threads of the rollout actors for each core, above which a run is warned."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What the checks found out on the way."""

    prompts: tuple[Prompt, ...]
    """Prompts to train on."""
    prompts_digest: str
    """SHA-256 of their file, or of themselves where the Hub has them."""
    hidden_size: int
    """Of the LLM."""
    llm: LLMIdentity
    """Its commit and chat template."""
    llm_digest: str
    """What tells its files from others: :func:`~mara.deploy.model_shape.find_digest`."""
    reward_digests: dict[str, dict[str, str]]
    """Reward head, or other reward model → file, or what else identifies it → SHA-256."""
    base_scores: dict[str, dict[str, float]]
    """Reward head → how the LLM's own answers were drawn → their mean score, where the head's fit measured
    them on this LLM."""
    unpacks_llm: bool
    """Whether the LLM is going to be unpacked into this machine's cache first."""
    log: FinishedLog | None
    """Where the episodes of ``replay.from`` are; None where rollout actors make new ones."""


def preflight(
    config: RunConfig, say: Callable[[str], None] = lambda _what: None, run_id: str | None = None
) -> Checked:
    """Check files, devices, the server and the models' sizes. Takes seconds; ``say`` is told what is next.

    What run ``run_id``, which is to go on, has on the server already is part of what it needs there.

    Raises:
        UserError: the first thing that is wrong: field, value, remedy.
    """
    say("checking folders and prompts")
    check_writable("run.dir", config.run.dir)
    check_wandb(config.wandb, os.environ)
    unpacks_llm = check_cache(config.llm, is_here=config.ray.address is None)
    train, held_out = config.prompts.train, config.prompts.evaluation
    prompts = load_source(train, "prompts.train")
    prompts_digest = digest_of(train, prompts)
    if held_out is not None:
        load_source(held_out, "prompts.evaluation")
        is_file = not (is_of_hub(train) or is_of_hub(held_out))
        if held_out == train or (is_file and held_out.samefile(train)):
            warn("prompts.evaluation is prompts.train; nothing is held out")
    check_start(config.learner, config.replay, config.shaping)
    say("checking devices")
    check_devices(config)
    warn_of_few_cores(config)
    if config.replay.redis_url is not None and config.replay.from_run is None:
        say("checking the server at replay.redis_url")
        check_stores(config.replay, config.rollout.num_actors, run_id)
    say("checking the LLM and the rewards")
    hidden_size = find_hidden_size(config.llm)
    check_context(config)
    check_llm_template(config.llm)
    llm = find_identity(config.llm)
    llm_digest = llm.commit or find_digest(config.llm)
    digests, base_scores = {}, {}
    for name, reward in config.reward_models.items():
        digests[name] = check_reward_model(f"rewards.{name}", reward)
    for name, head in config.heads.items():
        check_head(name, head.path, hidden_size)
        warn_of_head(name, head.path, config.llm.model)
        digests[name] = head_digests(head.path)
        is_own = is_same_llm(read_head_llm(head.path), config.llm.model)
        base_scores[name] = read_base_scores(head.path) if is_own else {}
    log = None
    if config.replay.from_run is not None:
        say("checking the run at replay.from")
        log = find_log(config, hidden_size, llm_digest)
        warn_of_forced(log.run_folder)
        for name in sorted(digests.keys() & log.heads.keys()):
            if digests[name] != log.heads[name]:
                is_head = name in config.heads
                what = ".path is another head" if is_head else " has another module or other settings"
                warn(
                    f"rewards.{name}{what} than the one that scored the episodes of {log.run_folder}; "
                    f"training goes by their scores, the evaluation by this {'head' if is_head else 'one'}"
                )
    return Checked(
        prompts=tuple(prompts),
        prompts_digest=prompts_digest,
        hidden_size=hidden_size,
        llm=llm,
        llm_digest=llm_digest,
        reward_digests=digests,
        base_scores=base_scores,
        unpacks_llm=unpacks_llm,
        log=log,
    )


def check_context(config: AgentUse) -> None:
    """Refuse answers that the LLM cannot read to their end, whatever the prompt, if its description tells.

    Prompts are measured once it is loaded: the limit on them may be more than any of them has.

    Raises:
        UserError: they are too long.
    """
    num_positions, answer = find_num_positions(config.llm), config.decoding.max_new_tokens
    if num_positions is not None and answer >= num_positions:
        raise UserError(
            f"decoding.max_new_tokens={answer}: {config.llm.model} can read {num_positions} tokens, prompt "
            "and answer together; lower it"
        )


def settled(config: RunConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """What the settings that are ``auto`` come to, where that can be told without loading or measuring.

    On a cluster the devices are those of its machines, which are not known here.
    """
    found = {}
    if config.ray.address is None:
        device = resolve_device(config.llm.device)
        if config.llm.device == "auto":
            found["llm.device"] = device.type
        if config.llm.dtype == "auto":
            found["llm.dtype"] = str(resolve_dtype("auto", device)).removeprefix("torch.")
        if config.learner.device == "auto":
            found["learner.device"] = learner_device("auto").type
    if config.wandb.mode == "auto":
        found["wandb.mode"] = wandb_mode(config.wandb, environment)
    return found


def check_cache(llm: LLMConfig, *, is_here: bool) -> bool:
    """Where the weights of a GGUF file are unpacked can be written. Whether they are not there already.

    Args:
        is_here: the LLM runs on this machine.
    """
    gguf_file = locate_model(llm)[1]
    cache = cache_folder()
    if gguf_file is None or not is_here or any(cache.glob(f"{Path(gguf_file).stem}-*/*")):
        return False
    try:
        check_writable("the cache", cache)
    except UserError as error:
        raise UserError(
            f"llm.model={llm.model} is unpacked into {cache}, which cannot be written; "
            "set XDG_CACHE_HOME to a folder that can"
        ) from error
    return True


def check_writable(field: str, folder: Path) -> None:
    """The folder that ``field`` names can be made and written."""
    try:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{field}={str(folder)[:80]}: {reason}; choose another") from error
    try:
        # Permissions do not tell everything: root has them in /proc, too.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"{field}={folder}: {existing} is not a folder that can be written; choose another"
        ) from error


def check_out(out: Path) -> None:
    """``out`` can be made, or is an empty folder.

    Raises:
        UserError: it is something else.
    """
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out={out} is not empty; give a new folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is not a folder; give a new one")
    place = out.resolve()
    check_writable("--out", place if place.is_dir() else place.parent)


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
    check_quantization(config.llm)
    num_gpus = torch.cuda.device_count()
    if torch.device("cpu" if config.llm.device == "auto" else config.llm.device).type == "cuda":
        if num_gpus == 0:
            raise UserError(f"llm.device={config.llm.device}: there is no GPU here; use auto or cpu")
        if config.rollout.num_gpus == 0 and config.rollout.num_actors > 0:
            raise UserError(
                f"llm.device={config.llm.device} needs a GPU for each rollout actor, rollout.num_gpus is 0; "
                "give each a part of one, such as 0.5"
            )
    if config.llm.device == "auto" and num_gpus and not config.rollout.num_gpus and config.rollout.num_actors:
        warn(
            f"rollout.num_gpus=0: the rollout actors work on the CPU, though there are {num_gpus} GPUs here; "
            "give each a part of one, such as 0.5"
        )
    if config.rollout.num_actors * config.rollout.num_gpus > num_gpus:
        raise UserError(
            f"rollout.num_gpus={config.rollout.num_gpus:g} for {config.rollout.num_actors} actors is more "
            f"than the {num_gpus} GPUs here; lower it or rollout.num_actors"
        )
    for name, reward in config.reward_models.items():
        device = reward.device if isinstance(reward, CheckpointConfig) else "auto"
        if device.startswith("cuda") and (num_gpus == 0 or reward.num_gpus == 0):
            raise UserError(
                f"rewards.{name}.device={device}: its num_gpus is {reward.num_gpus:g}, and there are "
                f"{num_gpus} GPUs here; give each replica a part of one, or use cpu"
            )
    in_all = config.reward_gpus + config.rollout.num_actors * config.rollout.num_gpus
    if in_all > num_gpus:
        raise UserError(
            f"rewards.NAME.num_gpus: reward models take {config.reward_gpus:g} GPUs, with the rollout actors "
            f"{in_all:g}, which is more than the {num_gpus} here; lower it, or replicas"
        )


def warn_of_few_cores(config: RunConfig) -> None:
    """Say in one line that the rollout actors of a run on this machine are far more than it has cores for.

    They would be slow, not wrong. Two threads a core are no reason: they are not all busy at once.
    """
    rollout, num_cores = config.rollout, len(os.sched_getaffinity(0))
    num_threads = rollout.num_actors * rollout.num_threads
    if config.ray.address is None and num_threads > CROWDED * num_cores:
        warn(
            f"rollout.num_actors={rollout.num_actors} × rollout.num_threads={rollout.num_threads} "
            f"is {num_threads} threads on {num_cores} cores, and each actor loads an LLM of its own; "
            "lower one of these settings"
        )


def check_head(name: str, path: Path, hidden_size: int) -> RewardHead:
    """The reward head ``name``, which can be read and fits the LLM's hidden size."""
    try:
        return load_head(path, hidden_size)
    except UserError as error:
        raise UserError(f"rewards.{name}.path: {error}") from error


def warn_of_head(name: str, path: Path, model: str) -> None:
    """Say in one line that the reward head ``name``, which can be read, was fitted for another LLM."""
    warn_of_another_llm(f"rewards.{name}.path", "fitted", read_head_llm(path), model)


def warn_of_another_llm(field: str, made: str, recorded: str | None, model: str) -> None:
    """Say in one line that what ``field`` names was ``made`` for another LLM of the same hidden size.

    To go from a model to a fine-tuned one may be meant.
    """
    if recorded is not None and not is_same_llm(recorded, model):
        warn(
            f"{field} was {made} for the LLM {recorded}, this one is {model}; it may not fit: use that "
            "LLM, or look at its figures again"
        )
