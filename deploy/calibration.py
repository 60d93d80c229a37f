"""``mara calibrate``: where a trained agent should step in, found on prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mara.actors.calibration import GateOutcome, choose_gate, is_proved, try_ways, ways_to_try, within
from mara.actors.config import DecodingConfig
from mara.common.errors import UserError
from mara.common.files import write_whole
from mara.deploy.config import AgentUse, RunConfig
from mara.deploy.console import say
from mara.deploy.evaluation import AnswerProgress, load_parts, report_folder
from mara.deploy.hub import load_source
from mara.deploy.run_folder import load_use, make_unused

CALIBRATION_USES = (
    "llm",
    "rewards",
    "decoding.truncation",
    "decoding.max_new_tokens",
    "decoding.fallback",
    "decoding.threshold",
    "decoding.num_compared",
    "decoding.mode",
    "decoding.window",
    "rollout.max_prompt_tokens",
    "evaluation.rows",
)
GATES_FILE = "gates.json"
COLUMNS = (
    "interventions: tokens that are not the LLM's first candidate; joint rate: answers better than the "
    "greedy LLM's by all rewards, less those worse by all; gain: mean excess of the scores over the greedy "
    "LLM's, in their deviations, ± its 95 % interval; perplexity: under the plain LLM, lower is likelier text"
)


def calibrate(
    folder: Path, config: AgentUse, given: Path | None, num_prompts: int, max_interventions: float
) -> GateOutcome | None:
    """Try ways to use the agent on the first ``num_prompts`` of the prompts ``given``, else of those of its
    training; print and save what each does, name the best.

    By value where the agent has its critic, else behind gates. It is named only if the interval of its gain
    is above 0.

    Raises:
        UserError: there are no prompts, no agent or reward model, a head does not fit, or a score is not
            finite.
    """
    if not math.isfinite(max_interventions):
        raise UserError(
            f"--max-interventions={max_interventions} is no number of times; a large one, such as 1e9, shuts "
            "nothing out"
        )
    if not any(config.score_weights.values()):
        raise UserError("rewards has none to judge by; give rewards.NAME.path=FOLDER and rewards.NAME.weight")
    prompts, field = _find_prompts(config, given)
    place = report_folder(folder, None)
    asked = load_source(prompts, field)[:num_prompts]
    say(f"calibration: {len(asked)} prompts of {prompts}")
    # The critic is welcome, not needed: without it there are gates to try.
    as_asked = config.decoding.model_copy(update={"steering": "policy"})
    parts = load_parts(folder, config.model_copy(update={"decoding": as_asked}), wants_critic=True)
    if parts.critic is None:
        say("the agent has no critic of its own: it is tried by policy, behind gates")
    outcomes = try_ways(
        parts.llm,
        parts.agent,
        parts.critic,
        ways_to_try(config.decoding, has_critic=parts.critic is not None),
        asked,
        parts.heads,
        config.score_weights,
        config.evaluation.rows,
        config.rollout.max_prompt_tokens,
        progress=AnswerProgress().tell,
        models=parts.models,
    )
    best = choose_gate(outcomes, max_interventions)
    # Without the changes of this command.
    now = load_use(folder).decoding
    print_gates(outcomes, best, now)
    if place != folder:
        place = make_unused(place)
    path = place / GATES_FILE
    content = {"prompts": prompts.name, "num_prompts": len(asked), "max_interventions": max_interventions}
    rows = [_row(outcome) for outcome in outcomes]
    chosen = None if best is None or not is_proved(best) else _row(best)["settings"]
    write_whole(path, json.dumps(content | {"chosen": chosen, "tried": rows}, indent=2) + "\n")
    for line in findings(outcomes, best, max_interventions, now, len(asked)):
        say(line)
    say(f"tried: {path}")
    return best


def findings(
    outcomes: Sequence[GateOutcome],
    best: GateOutcome | None,
    max_interventions: float,
    decoding: DecodingConfig,
    num_prompts: int,
) -> Iterator[str]:
    """What to do with ``outcomes``, of which ``best`` was chosen within ``max_interventions``, for an agent
    used as ``decoding``."""
    dense, top = outcomes[0], max(outcomes, key=lambda outcome: outcome.gain)
    if not dense.interventions:
        yield "by policy it never steps in, so --max-interventions shuts nothing out"
    if top.gain <= 0:
        yield "none gains anything on these prompts; train the agent longer"
        return
    if not any(outcome.interventions for outcome in within(outcomes, max_interventions)):
        yield "none that steps in at all does so this seldom; raise --max-interventions"
    elif best is None or best.gain <= 0:
        yield "none that steps in so seldom gains anything; raise --max-interventions"
    elif not is_proved(best):
        yield (
            f"none is named: {num_prompts} prompts cannot tell the best gain, {best.gain:+.2f} ± "
            f"{best.gain_error:.2f}, from none; give more (--num-prompts), or train the agent longer"
        )
    else:
        settings = " ".join(steering_settings(best.decoding, decoding))
        yield f"use it with: {settings or 'the settings that it has'}"
        for now in _now(outcomes, decoding):
            if now is not best:
                yield f"with that:         {_figures(best)}"
                yield f"as it is used now: {_figures(now)}"
        where = " within the limit" if dense.interventions else ""
        yield (
            f"it is the best{where}, of {len(outcomes)} on these {num_prompts} prompts, so it flatters "
            "itself: see what `mara eval` makes of it on held-out ones"
        )
    if dense.interventions and (best is None or top.gain > best.gain):
        # Rounded up: as a limit the number must let this one in.
        times = math.ceil(round(100 * top.interventions / dense.interventions, 6)) / 100
        yield (
            f"more is gained beyond the limit, at {times:.2f} times the interventions (--max-interventions), "
            f"{top.decoding.how}: {_figures(top)}"
        )


def _now(outcomes: Sequence[GateOutcome], decoding: DecodingConfig) -> list[GateOutcome]:
    """What the agent does as it is used already; nothing where that was not tried."""
    return [outcome for outcome in outcomes if _used(outcome.decoding) == _used(decoding)]


def _figures(outcome: GateOutcome) -> str:
    return (
        f"joint rate {outcome.joint.rate:+.1%}, gain {outcome.gain:+.2f} ± {outcome.gain_error:.2f}, "
        f"interventions {outcome.interventions:.1%}, perplexity {outcome.perplexity:.2f}"
    )


def _find_prompts(config: AgentUse, given: Path | None) -> tuple[Path, str]:
    """The file ``given``, or that of the run's training prompts, and what names it: thresholds fitted to
    held-out ones would make these tell too much of the agent.

    Raises:
        UserError: neither is there, as with an exported agent.
    """
    if given is not None:
        return given, "--prompts"
    if isinstance(config, RunConfig):
        return config.prompts.train, "prompts.train"
    raise UserError("--prompts is missing: an exported agent brings none; give a file of prompts")


def steering_settings(decoding: DecodingConfig, other: DecodingConfig) -> list[str]:
    """``decoding.key=value`` for each setting of an agent's use that ``decoding`` has unlike ``other``."""
    others = _steering(other)
    return [
        f"decoding.{name}={value:g}" if isinstance(value, float) else f"decoding.{name}={value}"
        for name, value in _used(decoding).items()
        if value != others[name]
    ]


def _steering(decoding: DecodingConfig) -> dict[str, Any]:
    """How an agent is used, by the name of the setting within ``decoding``."""
    names = ("steering", "min_advantage", "num_compared", "threshold", "fallback")
    groups = {"gate": decoding.gate, "truncation": decoding.truncation}
    within = {f"{group}.{name}": value for group, settings in groups.items() for name, value in settings}
    return {name: getattr(decoding, name) for name in names} | within


def _used(decoding: DecodingConfig) -> dict[str, Any]:
    """The same without what changes nothing."""
    return {name: value for name, value in _steering(decoding).items() if name not in decoding.idle}


def _row(outcome: GateOutcome) -> dict[str, Any]:
    """An outcome for programs."""
    row = asdict(outcome)
    del row["decoding"]
    return {"settings": _steering(outcome.decoding), **row}


def print_gates(outcomes: Sequence[GateOutcome], best: GateOutcome | None, decoding: DecodingConfig) -> None:
    """One row for each way; in the first the agent decides everywhere. The best is marked, and the one that
    is ``decoding``. Then what the columns are."""
    now = _now(outcomes, decoding)
    table = Table(title="Agent in each way to use it, against the LLM alone")
    for column in ("", "used", "interventions", "joint rate", "95 % interval", "gain", "perplexity"):
        is_text = column in ("", "used")
        table.add_column(
            column, justify="left" if is_text else "right", overflow="fold" if is_text else "ellipsis"
        )
    for outcome in outcomes:
        table.add_row(
            " ".join(mark for mark, is_one in (("now", outcome in now), ("best", outcome is best)) if is_one),
            outcome.decoding.how,
            f"{outcome.interventions:.1%}",
            f"{outcome.joint.rate:+.1%}",
            f"{outcome.joint.low:+.1%} to {outcome.joint.high:+.1%}",
            f"{outcome.gain:+.2f} ± {outcome.gain_error:.2f}",
            f"{outcome.perplexity:.2f}",
        )
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    console.print(COLUMNS, highlight=False)
