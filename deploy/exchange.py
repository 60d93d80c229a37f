"""``mara export`` and ``mara import``: an agent as a folder of its own, from a run or the authors' file."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mara.actors.llm import PACKAGE_PREFIX
from mara.common.agent import (
    CARD_FILE,
    CRITIC_FILE,
    WEIGHTS_FILE,
    Agent,
    load_agent,
    save_agent,
    seal_agent,
)
from mara.common.critic import TwinCritic, has_critic, load_critic, save_critic
from mara.common.errors import UserError
from mara.common.released import read_released_agent
from mara.deploy.agent_card import use_card, warn_of_losing, warn_of_untrained
from mara.deploy.config import AgentUse, RunConfig
from mara.deploy.config_file import make_settings
from mara.deploy.console import say, warn
from mara.deploy.model_shape import check_llm_template, find_hidden_size, find_identity
from mara.deploy.preflight import check_out
from mara.deploy.run_folder import agent_folder
from mara.deploy.run_lock import who_runs

EXPORT_USES = ("decoding",)


def export_agent(run: Path, config: AgentUse, out: Path) -> None:
    """Write the agent of the run in ``run``, whose settings are ``config``, into the new folder ``out``, with
    its critic if it has one. ``run`` may be an exported agent, which is to be used otherwise.

    Its card is that of the run's agent, with how ``config`` uses it, how it was trained
    (shaping and learner) and the SHA-256 of its weights and the critic's.

    Raises:
        UserError: the run's training goes on, its agent cannot be read, or ``out`` has something in it or
            cannot be written.
    """
    check_out(out)
    process = who_runs(run)
    folder = agent_folder(run)
    agent, card = load_agent(folder)
    critic = load_critic(folder) if has_critic(folder) else None
    by_value = config.decoding.steering == "value"
    if critic is None and by_value and card.get("decoding", {}).get("steering") == "policy":
        raise UserError(f"decoding.steering=value needs a critic, and {folder} has none; leave it out")
    # A run replaces weights and card one after the other. Once it has trained, the evaluation alone is left;
    # one that was complete and goes on has the card of before.
    training = card.get("training") or {}
    is_trained = not isinstance(config, RunConfig) or (
        training.get("complete") and training.get("episodes") == config.learner.num_episodes
    )
    if process is not None and not is_trained:
        raise UserError(f"{run} is in use: its training goes on ({process}); wait for its end")
    warn_of_untrained(card)
    warn_of_losing(run)
    _warn_of_local_llm(config.llm.model)
    if critic is None and by_value:
        warn("the run goes by value and has no critic; use the export with decoding.steering=policy")
    settings = config.model_dump(mode="json", include={"shaping", "learner", "decoding"})
    of_run = {"run": run.resolve().name} if isinstance(config, RunConfig) else {}
    _write(agent, critic, {**card, **of_run, **settings}, out)


def import_settings(llm: str, overrides: Sequence[str]) -> AgentUse:
    """How an agent of the authors is to be used: with ``llm``, as in their evaluation, else as in the paper.

    Raises:
        UserError: one line for each mistake.
    """
    theirs = {"llm": {"model": llm, "doubled_bos": True}, "decoding": {"fallback": "first"}}
    return make_settings(AgentUse, theirs, overrides, folder=Path.cwd())


def import_agent(file: Path, config: AgentUse, out: Path) -> None:
    """Write the agent in the authors' ``file`` into the new folder ``out``, with a card that says ``config``.

    Raises:
        UserError: the file or the LLM's description cannot be read, they do not fit, or ``out`` has something
            in it or cannot be written.
    """
    check_out(out)
    if config.decoding.steering == "value":
        raise UserError("decoding.steering=value needs a critic, and the authors released none; leave it out")
    agent = read_released_agent(file)
    hidden_size = find_hidden_size(config.llm)
    if agent.hidden_size != hidden_size:
        raise UserError(
            f"import: {file} was trained for hidden size {agent.hidden_size}, {config.llm.model} has "
            f"{hidden_size}; name the LLM it was trained for with --llm"
        )
    check_llm_template(config.llm)
    _warn_of_local_llm(config.llm.model)
    source = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    card = use_card(config, find_identity(config.llm)) | {"rewards": {}, "imported_from": source}
    _write(agent, None, card, out)


def _warn_of_local_llm(model: str) -> None:
    if not model.startswith(PACKAGE_PREFIX) and Path(model).expanduser().is_dir():
        warn(f"llm.model={model} is a folder of this machine; on others give llm.model with the agent")


def _write(agent: Agent, critic: TwinCritic | None, card: dict[str, Any], out: Path) -> None:
    """Make ``out``, which appears whole or not at all."""
    final = out.resolve()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror or error}; choose another") from error
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        save_agent(agent, partial, card)
        if critic is not None:
            save_critic(critic, partial)
        seal_agent(partial)
        partial.rename(final)  # fails where somebody else has put something there
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    beside = "" if critic is None else f", its critic: {out / CRITIC_FILE}"
    say(f"agent: {out / WEIGHTS_FILE}{beside}, its card: {out / CARD_FILE}")
