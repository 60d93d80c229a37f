"""The benchmarks of decoding on the LLM, the agent and the prompts of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mara.actors.decoding.policies import critic_used_in
from mara.actors.llm import LLM, load_llm
from mara.actors.rollout import render_prompts
from mara.common.agent import load_agent
from mara.common.errors import UserError
from mara.deploy.agent_card import warn_of_untrained
from mara.deploy.bench.decoding import Subject, bench_decode, bench_rollout
from mara.deploy.bench.figures import check_json_path, report
from mara.deploy.config import RunConfig
from mara.deploy.console import say
from mara.deploy.hub import load_source
from mara.deploy.model_shape import check_llm_template, find_hidden_size
from mara.deploy.preflight import check_context
from mara.deploy.run_folder import check_agent, load_run
from mara.deploy.usage import check_steering, check_used
from mara.learner.saving import AGENT_FOLDER

BENCH_USES = ("llm", "decoding", "rollout.rows", "rollout.max_prompt_tokens", "prompts.evaluation")
NEW_TOKENS = "decoding.max_new_tokens=64"
PAPER_SETS = (
    "decoding.truncation.top_k=40",
    "decoding.truncation.top_p=0.95",
    "decoding.truncation.temperature=0.8",
)
"""The candidate sets of the paper's experiments."""
BY_POLICY = "decoding.steering=policy"
"""Rollouts accept and reject however the agent is used later."""


def decode(
    run: Path, overrides: Sequence[str], json_file: Path | None, num_rounds: int, batches: Sequence[int]
) -> None:
    """``mara bench decode``.

    Raises:
        UserError: the run has no agent or too few prompts, or a setting is wrong.
    """
    config = _settings(run, [NEW_TOKENS, *overrides], json_file)
    subject = _subject(run, config, max(8, 2 * max(batches)))
    report(bench_decode(subject, config.decoding, batches, num_rounds, say), json_file)


def rollout(
    run: Path, overrides: Sequence[str], json_file: Path | None, num_rounds: int, peer_prompts: int
) -> None:
    """``mara bench rollout``.

    Raises:
        UserError: the run has no agent or too few prompts, or a setting is wrong.
    """
    config = _settings(run, [NEW_TOKENS, BY_POLICY, *PAPER_SETS, *overrides], json_file, is_rollout=True)
    if config.decoding.fallback != "last":
        raise UserError("decoding.fallback=first: the paper takes the last; set it to last")
    subject = _subject(run, config, peer_prompts)
    report(
        bench_rollout(subject, config.decoding, config.rollout.rows, num_rounds, peer_prompts, say), json_file
    )


def _settings(
    run: Path, overrides: Sequence[str], json_file: Path | None, *, is_rollout: bool = False
) -> RunConfig:
    check_json_path(json_file)
    config = load_run(run, overrides)
    check_used(overrides, BENCH_USES)
    if is_rollout and config.decoding.steering == "value":
        raise UserError("decoding.steering=value: rollouts are sampled by the policy; leave it out")
    if is_rollout:
        check_steering(overrides, [config.decoding], remedy="leave it out")
    else:
        check_steering(overrides, [config.decoding])
    check_agent(run)
    return config


def _subject(run: Path, config: RunConfig, least_prompts: int) -> Subject:
    if config.prompts.evaluation is None:
        raise UserError("prompts.evaluation is not set; give a file of prompts to measure with")
    prompts = load_source(config.prompts.evaluation, "prompts.evaluation")
    if len(prompts) < least_prompts:
        raise UserError(
            f"prompts.evaluation: {config.prompts.evaluation} has {len(prompts)} prompts, this takes "
            f"{least_prompts}; give more, or a smaller --batch or --peer-prompts"
        )
    check_context(config)
    check_llm_template(config.llm)
    hidden_size = find_hidden_size(config.llm)
    agent, card = load_agent(run / AGENT_FOLDER, hidden_size)
    critic = critic_used_in(config.decoding, run / AGENT_FOLDER, hidden_size)
    warn_of_untrained(card)
    say("loading the LLM")
    llm: LLM = load_llm(config.llm, pack=not config.decoding.compile)
    rendered = render_prompts(llm, prompts, config.rollout.max_prompt_tokens)
    return Subject(
        model=llm.model,
        plain_model=load_llm(config.llm, pack=False).model,
        name=llm.name,
        eos_ids=llm.eos_ids,
        agent=agent.requires_grad_(False).to(llm.device),
        agent_name=run.resolve().name,
        prompts=list(rendered.values()),
        critic=None if critic is None else critic.to(llm.device),
    )
