"""The same tables and figures with a small LLM, in minutes on two CPU cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from mara.deploy.paper.experiments import Step

SCALED_FOLDER = "runs/scaled"
"""Where the commands put runs and comparisons, in it one folder for each seed."""
RATIOS = {"0-1": (0, 2), "1-1": (1, 1), "2-1": (1.333, 0.667), "1-0": (2, 0)}
"""Of Table 5, from harmless to helpful, as the weights of both. They add up to 2 everywhere, as in the
quickstart: other sums would also change what the entropy and the divergence count beside the rewards."""


class Twin(NamedTuple):
    """The same of a small LLM, in minutes on two CPU cores."""

    title: str
    steps: Callable[[int], Iterator[Step]]
    """From the seed of its trainings."""
    notes: tuple[str, ...] = ()
    """What to know before, a line each."""


def _scaled(seed: int, name: str) -> str:
    return f"{SCALED_FOLDER}/seed-{seed}/{name}"


def _train_scaled(seed: int, name: str, *overrides: str) -> Step:
    words = [
        f"mara train quickstart run.dir={_scaled(seed, name)} run.seed={seed}",
        "evaluation.after_training=false",
        *overrides,
    ]
    return Step(" ".join(words))


def _quickstart(seed: int) -> Step:
    return _train_scaled(seed, "quickstart", "replay.durable=true")


def _scaled_agent(seed: int, name: str) -> str:
    return f"{_scaled(seed, name)}/latest"


def _table3_scaled(seed: int) -> Iterator[Step]:
    yield _quickstart(seed)
    agent, tuned = _scaled_agent(seed, "quickstart"), "YOUR/smollm2-adapter"
    words = [
        f"mara eval scaled/table3 systems.mara.path={agent} systems.mara_on_tuned.path={agent}",
        f"systems.tuned.adapter={tuned} systems.mara_on_tuned.adapter={tuned}",
        f"--out {_scaled(seed, 'table3')}",
    ]
    yield Step(" ".join(words))


def _table5_scaled(seed: int) -> Iterator[Step]:
    yield _quickstart(seed)
    log = _scaled_agent(seed, "quickstart")
    agents = [f"systems.live.path={log}"]
    for ratio, (helpful, harmless) in RATIOS.items():
        yield _train_scaled(
            seed,
            f"ratio-{ratio}",
            f"replay.from={log}",
            "rollout.num_actors=0",
            f"rewards.helpful.weight={helpful:g}",
            f"rewards.harmless.weight={harmless:g}",
        )
        agents.append(f"systems.ratio-{ratio}.path={_scaled_agent(seed, f'ratio-{ratio}')}")
    yield Step(f"mara eval scaled/table5 {' '.join(agents)} --out {_scaled(seed, 'table5')}")


def _figure3_scaled(seed: int) -> Iterator[Step]:
    training = _quickstart(seed)
    yield training
    for top_k in (3, 5, 10):
        for top_p in (0.8, 0.9, 0.95):
            sets = f"decoding.truncation.top_k={top_k} decoding.truncation.top_p={top_p}"
            agent = f"{_scaled_agent(seed, 'quickstart')} decoding.steering=policy"
            command = f"mara eval {agent} {sets} evaluation.num_prompts=60"
            yield Step(command, of=training.command)


TWINS = {
    "table3": Twin(
        "Table 3, scaled: the quickstart's agent on a fine-tuned LLM of the same hidden size",
        _table3_scaled,
        (
            "Put a PEFT adapter of yours for SmolLM2-135M-Instruct where YOUR/ stands; of a whole model say "
            "systems.NAME.model=FOLDER in place of systems.NAME.adapter.",
            "The judges read all answers with SmolLM2-135M-Instruct itself, for which they were fitted.",
        ),
    ),
    "table5": Twin(
        "Table 5, scaled: other weights of the two rewards, from the log of one quickstart",
        _table5_scaled,
        ("More prompts: add such as datasets.SafeRLHF.hub=SafeRLHF datasets.SafeRLHF.num_prompts=200.",),
    ),
    "figure3": Twin(
        "Figure 3, scaled: places of accepted candidates of the quickstart's agent under k and p",
        _figure3_scaled,
        (
            "Each evaluation draws accepted_positions_by_candidates.png of all so far into the run's folder.",
            "One agent, trained at k 5 and p 0.95.",
        ),
    ),
}
"""Of :data:`EXPERIMENTS`, by the same names."""
