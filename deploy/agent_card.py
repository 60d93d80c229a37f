"""The card beside an agent: what it was trained with and belongs to, and whether it is used like that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from mara.actors.evaluation import PreferenceRate
from mara.actors.llm import FINAL_NORM
from mara.deploy.config import AgentUse, RunConfig, portable_name
from mara.deploy.console import shown, warn
from mara.deploy.model_shape import LLMIdentity, find_identity, is_same_llm
from mara.deploy.preflight import Checked, warn_of_another_llm
from mara.deploy.reward_models import reward_settings
from mara.deploy.run_folder import REPORT_FILE

REVISION, GGUF_FILE = "llm.revision", "llm.gguf_file"
"""Settings that mean something only beside the name of their LLM."""
LIKE_IN_TRAINING = (
    "llm.quantization",
    "llm.system_prompt",
    "llm.doubled_bos",
    "decoding.truncation.top_k",
    "decoding.truncation.top_p",
    "decoding.truncation.temperature",
)
"""Settings on which the agent's states and candidates depend."""


def use_card(config: AgentUse, llm: LLMIdentity) -> dict[str, Any]:
    """What it takes to use an agent as it was trained: LLM, decoding, what a state is; and who wrote this."""
    kept: dict[str, Any] = {"llm": True, "decoding": True, "rollout": {"max_prompt_tokens"}}
    prompt = config.llm.system_prompt
    return config.model_dump(mode="json", include=kept) | {
        "states": {"layer": "last", "final_norm": FINAL_NORM},
        "llm_commit": llm.commit,
        "chat_template_sha256": llm.template_digest,
        "system_prompt_sha256": None if prompt is None else hashlib.sha256(prompt.encode()).hexdigest(),
        "versions": {
            "mara": version("mara-rl"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def agent_card(config: RunConfig, checked: Checked, run_id: str) -> dict[str, Any]:
    """What is kept beside an agent: what it was trained with and belongs to, as another machine can tell it.

    Of each reward head the weight, the name, and the SHA-256 of its files: not its folder, which is this
    machine's affair. Of each other reward model the weight, and the settings that a score depends on. Of the
    prompts the name, SHA-256 and number; of a run that trained on the episodes of another one, that run's
    name instead.
    """
    rewards = {
        name: {
            "head": portable_name(head.path),
            "weight": head.weight,
            "sha256": dict(checked.reward_digests[name]),
        }
        for name, head in config.heads.items()
    } | {
        name: {
            "settings": reward_settings(reward),
            "weight": reward.weight,
            "sha256": dict(checked.reward_digests[name]),
        }
        for name, reward in config.reward_models.items()
    }
    data: dict[str, Any]
    if config.replay.from_run is not None:
        data = {"episodes_of": config.replay.from_run.name}
    else:
        data = {
            "prompts": portable_name(config.prompts.train),
            "sha256": checked.prompts_digest,
            "num_prompts": len(checked.prompts),
        }
    return use_card(config, checked.llm) | {
        "rewards": rewards,
        "training_data": data,
        "seed": config.run.seed,
        "run_id": run_id,
    }


def warn_of_untrained(card: Mapping[str, Any]) -> None:
    """Say in one line that the agent with this card is as it was before its training.

    An older card does not tell.
    """
    training = card.get("training")
    if isinstance(training, dict) and training.get("policy_steps") == 0:
        num_steps = training.get("gradient_steps", 0)
        warn(
            f"the agent is untrained: of the {num_steps} gradient steps of its run none was the policy's; "
            "train with more learner.num_episodes, or fewer learner.sac.critic_only_steps"
        )


def warn_of_losing(folder: Path) -> None:
    """Say in one line that by its own report the agent of the run in ``folder`` is worse than none."""
    path = folder / REPORT_FILE
    try:
        pair = json.loads(path.read_text())["pairs"][0]
        rates = {name: PreferenceRate(**rate) for name, rate in pair.items() if isinstance(rate, dict)}
        # One judge alone makes no joint rate.
        judge, rate = next((name, rates[name]) for name in ("joint", *rates) if name in rates)
        is_worse = rate.is_enough and rate.high < 0
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return  # There is no report, or it is no report of ours.
    if is_worse:
        warn(
            f"the LLM's own answers are better than those with this agent ({judge} {rate.rate:+.1%}, "
            f"{path}); "
            "train it longer (learner.num_episodes) before you use it"
        )


def warn_of_other_use(card: Mapping[str, Any], config: AgentUse) -> None:
    """Say in one line each what differs between the training of the agent with this card and ``config``.

    What the card does not tell is not compared. Another hidden size is an error elsewhere.

    Raises:
        UserError: the LLM's tokenizer cannot be read.
    """
    trained_for = card.get("llm")
    recorded = trained_for.get("model") if isinstance(trained_for, dict) else trained_for
    is_same = not isinstance(recorded, str) or is_same_llm(recorded, config.llm.model)
    if isinstance(recorded, str):
        warn_of_another_llm("the agent", "trained", recorded, config.llm.model)
    for difference in _differences(card, config, is_same):
        warn(difference)


def warn_of_left_out(card: Mapping[str, Any], config: AgentUse) -> None:
    """Say in one line which rewards of the training an evaluation leaves out: a card gives the heads alone.

    A function or a server that a card from somebody else names is not called.
    """
    rewards = card.get("rewards")
    if isinstance(rewards, dict) and (missing := sorted(map(str, rewards.keys() - config.rewards.keys()))):
        warn(
            f"the agent was trained by {', '.join(map(shown, missing))} as well, which its card only names; "
            "give rewards.NAME.kind and its settings to compare by them"
        )


def _differences(card: Mapping[str, Any], config: AgentUse, is_same_model: bool) -> Iterator[str]:
    settings, llm = config.model_dump(mode="json"), find_identity(config.llm)
    names = [*((REVISION, GGUF_FILE) if is_same_model else ()), *LIKE_IN_TRAINING]
    commit = card.get("llm_commit")
    if is_same_model and commit is not None and llm.commit is not None:
        names.remove(REVISION)  # A branch may have moved, and two names may mean one commit.
        if llm.commit != commit:
            yield (
                f"{config.llm.model} is at commit {llm.commit}, the agent was trained with {shown(commit)}; "
                f"give {REVISION}={shown(commit)}, or look at `mara eval` before you rely on its answers"
            )
    for name in names:
        for theirs in _at(card, name):
            for ours in _at(settings, name):
                if theirs != ours:
                    is_whole = shown(theirs) == theirs or not isinstance(theirs, str)
                    wanted = f"{name}={shown(theirs)}" if is_whole else f"{name} of its card"
                    yield (
                        f"{name}={shown(ours)}, the agent was trained with {shown(theirs)}; give {wanted}, "
                        "or look at `mara eval` before you rely on its answers"
                    )
    for norm in _at(card, "states.final_norm"):
        if norm != FINAL_NORM:
            yield (
                f"the agent was trained on hidden states with the LLM's final norm {shown(norm)}, here it "
                f"is {FINAL_NORM}; train an agent on these, its answers mean little"
            )
    for theirs in _at(card, "chat_template_sha256"):
        if theirs != llm.template_digest:
            given = _at(card, "llm.chat_template")
            remedy = "use the LLM's files of then"
            if config.llm.chat_template is not None:
                remedy = "leave out llm.chat_template"
            if any(given):
                remedy = "give llm.chat_template of its card"
            yield (
                f"the LLM's chat template is {_digest(llm.template_digest)}, the agent was trained with "
                f"{_digest(theirs)}; {remedy}, or look at `mara eval` before you rely on its answers"
            )


def _at(content: Mapping[str, Any], name: str) -> list[Any]:
    """The value at a dotted name; empty where there is none."""
    value: Any = content
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return []
        value = value[part]
    return [value]


def _digest(value: object) -> str:
    return "none" if value is None else f"SHA-256 {str(value)[:12]}…"
