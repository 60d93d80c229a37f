"""``mara eval`` and ``mara generate``: what the agent of a run does to the LLM's text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mara.actors.config import DecodingConfig
from mara.actors.decoding.policies import AnyPolicy, critic_used_in, steered_by
from mara.actors.evaluation import EvaluationReport, Outcome, Sample, answer_prompts, evaluate
from mara.actors.heads import RewardHead
from mara.actors.llm import LLM, load_llm, resolve_device
from mara.actors.prompts import Prompt, check_unicode
from mara.actors.reward_models.loading import load_reward_model
from mara.common.agent import Agent, load_agent
from mara.common.contracts import RewardModel
from mara.common.critic import TwinCritic, has_critic, load_critic
from mara.common.errors import UserError
from mara.common.files import write_whole
from mara.deploy.agent_card import (
    warn_of_left_out,
    warn_of_losing,
    warn_of_other_use,
    warn_of_untrained,
)
from mara.deploy.config import AgentUse, is_of_hub
from mara.deploy.console import clock, say, warn
from mara.deploy.finished_run import FORCED_SHARE, MUCH_FORCED
from mara.deploy.hub import load_source
from mara.deploy.model_shape import check_llm_template, find_hidden_size
from mara.deploy.output import complain
from mara.deploy.plots import draw_positions_by_candidates
from mara.deploy.preflight import check_context, check_head, check_out, check_writable, warn_of_head
from mara.deploy.reward_models import check_reward_model
from mara.deploy.run_folder import REPORT_FILE, agent_folder, make_unused, set_report_aside

SYSTEMS = {"base": "base LLM, greedy", "agent": "with the agent, greedy", "base_sampled": "base LLM, sampled"}
OUTCOMES: dict[Outcome, str] = {
    "better": "the agent's answer is better by all rewards",
    "worse": "the agent's answer is worse by all rewards",
    "mixed": "the rewards disagree, or one of them ties",
    "same": "both answers are the same",
}
SAY_EVERY_S = 10.0
KNOWN_FROM = 20
"""When one in so many answers has ended, how long all take is guessed."""
EVALUATION_USES = (
    "llm",
    "prompts.evaluation",
    "rewards",
    "decoding",
    "rollout.max_prompt_tokens",
    "evaluation.num_prompts",
    "evaluation.rows",
    "evaluation.num_samples",
    "run.seed",
)
GENERATION_USES = ("llm", "decoding", "rollout.max_prompt_tokens")


def run_evaluation(
    folder: Path, config: AgentUse, *, out: Path | None = None, after_training: bool = False
) -> dict[str, float]:
    """Compare the agent in ``folder`` with the LLM alone on the held-out prompts; print and save the report.

    The report is put into ``out``, else into the run's folder; an exported agent stays as it is, so its
    report gets a new folder in ``runs``. Returns the headline figures by metric name. With ``after_training``
    heads of another LLM and an untrained agent are not told of: the training has done so.

    Raises:
        UserError: there is no agent, no evaluation prompts were configured, a reward does not fit, or a
            score is not finite.
    """
    if config.prompts.evaluation is None:
        raise UserError("prompts.evaluation is not set; give a file of held-out prompts to compare on")
    if not any(config.score_weights.values()):
        raise UserError(
            "rewards is empty or has no weight but 0, there is nothing to compare by; give "
            "rewards.NAME.path=FOLDER and rewards.NAME.weight=NUMBER"
        )
    place = report_folder(folder, out)
    prompts = load_source(config.prompts.evaluation, "prompts.evaluation")[: config.evaluation.num_prompts]
    say(
        f"evaluation: {len(prompts)} held-out prompts; the LLM alone, with the agent, and sampled (the "
        "yardstick of fluency)"
    )
    parts = load_parts(folder, config, is_told=after_training)
    report = evaluate(
        parts.llm,
        steered_by(parts.agent, config.decoding, parts.critic),
        prompts,
        parts.heads,
        config.score_weights,
        config.decoding,
        rows=config.evaluation.rows,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        seed=config.run.seed,
        progress=AnswerProgress().tell,
        models=parts.models,
    )
    source = config.prompts.evaluation
    dataset = str(source) if is_of_hub(source) else source.stem
    content = report_json(report, dataset) | {"settings": used_settings(config), "training": parts.training}
    if place != folder:
        place = make_unused(place) if out is None else place
        place.mkdir(parents=True, exist_ok=True)
    path = place / REPORT_FILE
    kept = set_report_aside(place)
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    print_report(report, config.decoding, config.evaluation.num_samples)
    say(f"report: {path}" + (f" (the earlier one is now {kept.name})" if kept else ""))
    # By name: a name has the time at which the report was made.
    earlier = sorted(place.glob(f"{path.stem}-*{path.suffix}"))
    try:
        plot = draw_positions_by_candidates(place, [*earlier, path])
    except OSError as error:
        warn(f"no plot of the accepted candidates by k and p ({error})")
    else:
        if plot is not None:
            say(f"places of the accepted candidates by k and p: {plot}")
    return headline(report)


def report_folder(folder: Path, out: Path | None) -> Path:
    """Where the report on the agent in ``folder`` goes; it need not be there yet.

    Raises:
        UserError: it cannot be written.
    """
    if out is not None:
        check_out(out)
        return out
    if agent_folder(folder) != folder:
        return folder
    new = Path("runs") / f"{folder.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_writable("--out", new)
    return new


class Parts(NamedTuple):
    """What it takes to judge an agent, on the LLM's device."""

    llm: LLM
    agent: Agent
    critic: TwinCritic | None
    """None where it is not asked for."""
    heads: dict[str, RewardHead]
    models: dict[str, Callable[[], RewardModel]]
    """Loads each of the reward models that are no heads."""
    training: dict[str, Any] | None
    """How far the agent's training had come; None where its card does not tell."""


def load_parts(folder: Path, config: AgentUse, *, is_told: bool = False, wants_critic: bool = False) -> Parts:
    """The agent in ``folder`` with its LLM and reward heads, the LLM last: what is wrong shows at once.

    With ``is_told`` heads of another LLM and an untrained agent are not told of. With ``wants_critic`` the
    critic comes along if there is one, also where ``config`` does not go by value.

    Raises:
        UserError: there is no agent, or a part does not fit another.
    """
    hidden_size = find_hidden_size(config.llm)
    check_context(config)
    check_llm_template(config.llm)
    agent, critic, card = _read_agent(folder, config, hidden_size, wants_critic=wants_critic)
    heads = {name: check_head(name, head.path, hidden_size) for name, head in config.heads.items()}
    models: dict[str, Callable[[], RewardModel]] = {}
    for name, reward in config.reward_models.items():
        check_reward_model(f"rewards.{name}", reward)
        models[name] = partial(load_reward_model, f"rewards.{name}", reward, Path.cwd())
    if not is_told:
        warn_of_untrained(card)
        warn_of_left_out(card, config)
        for name, head in config.heads.items():
            warn_of_head(name, head.path, config.llm.model)
    llm = _load(config, say)
    on_device = {name: head.to(llm.device) for name, head in heads.items()}
    return Parts(
        llm,
        agent.to(llm.device),
        None if critic is None else critic.to(llm.device),
        on_device,
        models,
        card.get("training"),
    )


def generate(folder: Path, config: AgentUse, prompt: str) -> None:
    """Print the LLM's own answer to ``prompt`` and the one with the agent of the run in ``folder``."""
    if not prompt.strip():
        raise UserError("PROMPT is empty; ask something")
    check_unicode(prompt, "PROMPT")
    hidden_size = find_hidden_size(config.llm)
    check_context(config)
    check_llm_template(config.llm)
    agent, critic, card = _read_agent(folder, config, hidden_size)
    warn_of_untrained(card)
    warn_of_losing(folder)
    llm = _load(config, complain)  # Standard output is for the answers alone.
    policies: dict[str, AnyPolicy] = {
        "base": "greedy",
        "agent": steered_by(
            agent.to(llm.device), config.decoding, None if critic is None else critic.to(llm.device)
        ),
    }
    prompts = [Prompt("prompt", prompt)]
    answers = answer_prompts(
        llm, prompts, config.decoding, policies, len(policies), config.rollout.max_prompt_tokens
    )
    for system, (answer,) in answers.items():
        say(f"{SYSTEMS[system]}:\n{llm.decode(answer.response_ids).strip()}\n")
    if any(answer.finish_reason == "length" for (answer,) in answers.values()):
        limit = config.decoding.max_new_tokens
        complain(f"answers are cut at {limit} tokens; add decoding.max_new_tokens=NUMBER for longer ones")


def used_settings(config: AgentUse) -> dict[str, Any]:
    """The settings that an evaluation depends on, nested as in the configuration."""
    content = config.model_dump(mode="json")
    kept: dict[str, Any] = {}
    for group, _, name in (key.partition(".") for key in EVALUATION_USES):
        if name:
            kept.setdefault(group, {})[name] = content[group][name]
        else:
            kept[group] = content[group]
    return kept


def report_json(report: EvaluationReport, dataset: str) -> dict[str, Any]:
    """The report for programs: ``pairs`` of systems with their preference rates, the same rates by category
    of prompts (``categories``), then all the rest; ``samples`` are all prompts with their answers.

    Rates are fractions; ``low`` and ``high`` are the ends of the 95 % interval.
    """
    details = report.to_json()
    rates = details.pop("preference")
    pair = {"a": "agent", "b": "base", "dataset": dataset, "num_prompts": report.num_prompts, **rates}
    categories = {
        name: {"num_prompts": group["num_prompts"], **group["preference"]}
        for name, group in details.pop("categories").items()
    }
    for sample in details["samples"]:
        if not sample["category"]:
            del sample["category"]
    return {"pairs": [pair], "categories": categories, **details}


def headline(report: EvaluationReport) -> dict[str, float]:
    """The figures of a report that belong into a table of runs."""
    figures = {f"eval/preference/{name}": rate.rate for name, rate in report.preference.items()}
    figures |= {f"eval/perplexity/{system}": value.perplexity for system, value in report.fluency.items()}
    figures["eval/perplexity_ratio"] = (
        report.fluency["agent"].perplexity / report.fluency["base_sampled"].perplexity
    )
    figures["eval/decisions_per_token"] = report.decisions_per_token
    if report.forced_share is not None:
        figures[FORCED_SHARE] = report.forced_share
    figures["eval/interventions"] = report.interventions
    return figures


def print_report(report: EvaluationReport, decoding: DecodingConfig, num_samples: int) -> None:
    """The report for people: preference, in all and by category, fluency, places of the tokens taken, up to
    the last that ``decoding`` allows, and ``num_samples`` of the prompts with their answers, of every outcome
    in turn."""
    console = Console(width=None if Console().is_terminal else 110)
    console.print(_rates_table(report, decoding.how))
    console.print(_fluency_table(report))
    places = ", ".join(_places(report.accepted_ranks, decoding.truncation.top_k))
    asked = f"{report.decisions_per_token:.2f}"
    changed = f"{report.interventions:.1%} of all tokens, with and without a choice,"
    console.print(f"{changed} are not the LLM's first candidate.", highlight=False)
    if not report.decisions_per_token:
        console.print(
            "The agent was asked nowhere: its gate let it decide no token, or each had one candidate."
        )
    elif report.forced_share is None:
        console.print(f"Candidate taken by its place: {places}; {asked} candidates compared a token.")
    else:
        console.print(
            f"Accepted candidate by its place: {places}; {asked} decisions a token; "
            f"{report.forced_share:.0%} of the decided tokens were forced (all others rejected)."
        )
    if report.forced_share is not None and report.forced_share > MUCH_FORCED:
        console.print(
            "So many are a sign of too little training: train it longer (learner.num_episodes).",
            highlight=False,
        )
    if report.interventions == 0:
        remedy = "Train the agent longer (learner.num_episodes), or by value lower decoding.min_advantage."
        if not report.decisions_per_token:
            gate = decoding.gate.how
            remedy = (
                f"Loosen decoding.gate ({gate})." if gate else "Allow more candidates (decoding.truncation)."
            )
        console.print(
            "The LLM's first candidate was taken everywhere: the answers are the LLM's own. " + remedy,
            highlight=False,
        )
    for sample in of_each_outcome(report.samples, num_samples):
        console.rule(style="dim")
        console.print(f"prompt: {sample.prompt}", markup=False, highlight=False)
        console.print(f"({OUTCOMES[sample.outcome]})", highlight=False)
        for system, answer in sample.answers.items():
            scores = ", ".join(f"{name} {value:+.2f}" for name, value in sample.scores[system].items())
            console.print(f"{system} ({scores}): {answer.strip()}", markup=False, highlight=False)
    console.rule(style="dim")


def _rates_table(report: EvaluationReport, how: str) -> Table:
    """Preference rates, of all prompts and by category; ``how`` the agent was used."""
    table = Table(
        title=f"Agent ({how}) against the LLM alone, {report.num_prompts} held-out prompts (Eq. 12)"
    )
    for column in ("prompts", "judge", "preference rate", "95 % interval", "wins", "ties", "losses"):
        table.add_column(column, justify="left" if column in ("prompts", "judge") else "right")
    groups = {f"all {report.num_prompts}": report.preference}
    # One category that holds every prompt would repeat the rows of all.
    if any(group.num_prompts < report.num_prompts for group in report.categories.values()):
        groups |= {
            f"{group.num_prompts} {name}": group.preference for name, group in report.categories.items()
        }
    for who, rates in groups.items():
        for number, (judge, rate) in enumerate(rates.items()):
            interval = rate.interval() if report.num_different else "no answer differs"
            counts = (str(rate.wins), str(rate.ties), str(rate.losses))
            # Text: a category may hold what rich takes for markup.
            table.add_row(Text("" if number else who), judge, f"{rate.rate:+.1%}", interval, *counts)
        table.add_section()
    return table


def _fluency_table(report: EvaluationReport) -> Table:
    table = Table(title="Is it still language?")
    for column in ("system", "perplexity", "distinct-1, -2, -3", "tokens", "ended itself"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for system, value in report.fluency.items():
        table.add_row(
            SYSTEMS[system],
            f"{value.perplexity:.2f}",
            f"{value.distinct_1:.3f}, {value.distinct_2:.3f}, {value.distinct_3:.3f}",
            f"{value.mean_tokens:.1f}",
            f"{value.eos_share:.0%}",
        )
    return table


def of_each_outcome(samples: Sequence[Sample], number: int) -> list[Sample]:
    """So many of the ``samples``, in their order: of each outcome as many as of the others, evenly spread."""
    number = min(number, len(samples))
    places = {
        outcome: [place for place, sample in enumerate(samples) if sample.outcome == outcome]
        for outcome in OUTCOMES
    }
    wanted = dict.fromkeys(places, 0)
    while sum(wanted.values()) < number:
        for outcome, of in places.items():
            if wanted[outcome] < len(of) and sum(wanted.values()) < number:
                wanted[outcome] += 1
    # The middle of each of so many equal parts.
    picked = [
        of[(2 * part + 1) * len(of) // (2 * wanted[outcome])]
        for outcome, of in places.items()
        for part in range(wanted[outcome])
    ]
    return [samples[place] for place in sorted(picked)]


def _places(accepted_ranks: Sequence[float], top_k: int) -> list[str]:
    """The share of each place that a candidate can have; the last of ``accepted_ranks`` is the rest."""
    *shares, rest = accepted_ranks
    places = [f"{place}: {share:.0%}" for place, share in enumerate(shares[:top_k], start=1)]
    return [*places, f"later: {rest:.0%}"] if top_k > len(shares) else places


def _read_agent(
    folder: Path, config: AgentUse, hidden_size: int, *, wants_critic: bool = False
) -> tuple[Agent, TwinCritic | None, dict[str, Any]]:
    """The agent in ``folder``, on the CPU, its critic where ``config`` goes by value, and its card. Read
    before the LLM: what is wrong shows at once."""
    place = agent_folder(folder)
    agent, card = load_agent(place, hidden_size)
    critic = critic_used_in(config.decoding, place, hidden_size)
    if critic is None and wants_critic and has_critic(place):
        critic = load_critic(place, hidden_size).requires_grad_(False)
    warn_of_other_use(card, config)
    return agent.requires_grad_(False), critic, card


def _load(config: AgentUse, tell: Callable[[str], None]) -> LLM:
    resolve_device(config.llm.device)
    tell("loading the LLM")
    return load_llm(config.llm, pack=not config.decoding.compile)


class AnswerProgress:
    """A line at the start, every ten seconds once answers end, and when all is done."""

    def __init__(self) -> None:
        self._began_s = self._said_s = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if done == 0:
            say(f"  {total} answers to make")
        elif done == total or now_s - self._said_s >= SAY_EVERY_S:
            self._said_s, took_s = now_s, now_s - self._began_s
            # Answers are made many at a time: the first ones to end say nothing of how long all take.
            is_known = total / KNOWN_FROM <= done < total
            eta = f", ETA {clock(took_s * (total - done) / done)}" if is_known else ""
            say(f"  {done}/{total} answers, {took_s:.0f} s{eta}")
