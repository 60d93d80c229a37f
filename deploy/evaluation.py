"""``mara eval`` and ``mara generate``: what the agent of a run does to the LLM's text."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mara.actors.decoding.policies import AgentPolicy, Plain, Policy
from mara.actors.evaluation import EvaluationReport, answer_prompts, evaluate
from mara.actors.heads import load_head
from mara.actors.llm import LLM, load_llm
from mara.actors.prompts import Prompt, load_prompts
from mara.common.agent import Agent, load_agent
from mara.common.errors import UserError
from mara.deploy.config import RunConfig
from mara.deploy.console import say
from mara.learner.loop import AGENT_FOLDER

REPORT_FILE = "report.json"
SYSTEMS = {"base": "base LLM, greedy", "agent": "with the agent, greedy", "base_sampled": "base LLM, sampled"}
SAY_EVERY_S = 10.0


def run_evaluation(folder: Path, config: RunConfig) -> dict[str, float]:
    """Compare the agent in ``folder`` with the LLM alone on the held-out prompts; print and save the report.

    Returns the headline figures by metric name.

    Raises:
        UserError: there is no agent, or no evaluation prompts were configured.
    """
    if config.prompts.evaluation is None:
        raise UserError("prompts.evaluation is not set; give a file of held-out prompts to compare on")
    prompts = load_prompts(config.prompts.evaluation)[: config.evaluation.num_prompts]
    say(f"evaluation: {len(prompts)} held-out prompts, the LLM alone and with the agent")
    llm, agent = _load(folder, config)
    report = evaluate(
        llm,
        agent,
        prompts,
        {name: load_head(head.path, llm.hidden_size).to(llm.device) for name, head in config.rewards.items()},
        config.score_weights,
        config.decoding,
        rows=config.evaluation.rows,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        seed=config.run.seed,
        num_samples=config.evaluation.num_samples,
        progress=_Progress().tell,
    )
    content = report_json(report, config.prompts.evaluation.stem)
    (folder / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n")
    print_report(report)
    return headline(report)


def generate(folder: Path, config: RunConfig, prompt: str) -> None:
    """Print the LLM's own answer to ``prompt`` and the one with the agent of the run in ``folder``."""
    if not prompt.strip():
        raise UserError("PROMPT is empty; ask something")
    llm, agent = _load(folder, config)
    policies: dict[str, Policy | Plain] = {
        "base": "greedy",
        "agent": AgentPolicy(agent, config.decoding.threshold),
    }
    for system, policy in policies.items():
        (answer,) = answer_prompts(
            llm, [Prompt("prompt", prompt)], config.decoding, policy, 1, config.rollout.max_prompt_tokens
        )
        say(f"{SYSTEMS[system]}:\n{llm.decode(answer.response_ids).strip()}\n")


def report_json(report: EvaluationReport, dataset: str) -> dict[str, Any]:
    """The report for programs: ``pairs`` of systems with their preference rates, then all the rest.

    Rates are fractions; ``low`` and ``high`` are the ends of the 95 % interval.
    """
    details = report.to_json()
    rates = details.pop("preference")
    pair = {"a": "agent", "b": "base", "dataset": dataset, "num_prompts": report.num_prompts, **rates}
    return {"pairs": [pair], **details}


def headline(report: EvaluationReport) -> dict[str, float]:
    """The figures of a report that belong into a table of runs."""
    figures = {f"eval/preference/{name}": rate.rate for name, rate in report.preference.items()}
    figures |= {f"eval/perplexity/{system}": value.perplexity for system, value in report.fluency.items()}
    figures["eval/perplexity_ratio"] = (
        report.fluency["agent"].perplexity / report.fluency["base_sampled"].perplexity
    )
    figures["eval/decisions_per_token"] = report.decisions_per_token
    return figures


def print_report(report: EvaluationReport) -> None:
    """The report for people: preference, fluency, accepted positions, samples."""
    console = Console(width=None if Console().is_terminal else 110)
    table = Table(title=f"Agent against the LLM alone, {report.num_prompts} held-out prompts (Eq. 12)")
    for column in ("judge", "preference rate", "95 % interval", "wins", "ties", "losses"):
        table.add_column(column, justify="left" if column == "judge" else "right")
    for name, rate in report.preference.items():
        interval = f"{rate.low:+.1%} to {rate.high:+.1%}"
        table.add_row(name, f"{rate.rate:+.1%}", interval, str(rate.wins), str(rate.ties), str(rate.losses))
    console.print(table)
    table = Table(title="Is it still language?")
    for column in (
        "system",
        "perplexity",
        "distinct-1",
        "distinct-2",
        "distinct-3",
        "tokens",
        "ended itself",
    ):
        table.add_column(column, justify="left" if column == "system" else "right")
    for system, value in report.fluency.items():
        table.add_row(
            SYSTEMS[system],
            f"{value.perplexity:.2f}",
            f"{value.distinct_1:.3f}",
            f"{value.distinct_2:.3f}",
            f"{value.distinct_3:.3f}",
            f"{value.mean_tokens:.1f}",
            f"{value.eos_share:.0%}",
        )
    console.print(table)
    places = [f"{place}: {share:.0%}" for place, share in enumerate(report.accepted_ranks[:-1], start=1)]
    console.print(
        f"Accepted candidate by its place: {', '.join(places)}, later: {report.accepted_ranks[-1]:.0%}; "
        f"{report.decisions_per_token:.2f} decisions a token; {report.forced_share:.0%} of the decided "
        "tokens were forced (all others rejected)."
    )
    for sample in report.samples:
        console.rule(style="dim")
        console.print(f"prompt: {sample.prompt}", markup=False, highlight=False)
        for system, answer in sample.answers.items():
            scores = ", ".join(f"{name} {value:+.2f}" for name, value in sample.scores[system].items())
            console.print(f"{system} ({scores}): {answer.strip()}", markup=False, highlight=False)
    console.rule(style="dim")


def _load(folder: Path, config: RunConfig) -> tuple[LLM, Agent]:
    """The LLM and the agent of a run. The agent is read first: what is wrong with it shows at once."""
    agent, _ = load_agent(folder / AGENT_FOLDER)
    say("loading the LLM")
    llm = load_llm(config.llm)
    if llm.hidden_size != agent.hidden_size:
        load_agent(folder / AGENT_FOLDER, llm.hidden_size)
    return llm, agent.to(llm.device).requires_grad_(False)


class _Progress:
    """A line when a system starts, every ten seconds, and when it is done."""

    def __init__(self) -> None:
        self._system = ""
        self._began_s = 0.0
        self._said_s = 0.0

    def tell(self, system: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if system != self._system:
            self._system, self._began_s, self._said_s = system, now_s, now_s
        if done == total or now_s - self._said_s >= SAY_EVERY_S:
            self._said_s = now_s
            say(f"  {SYSTEMS[system]}: {done}/{total} answers, {now_s - self._began_s:.0f} s")
