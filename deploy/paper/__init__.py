"""``mara paper``: the commands that make the tables and figures of the paper, and what they would cost.

Some have a twin of a small LLM, for two CPU cores.
Nothing is started here. A run's folder is found again by ``run.dir`` and the link ``latest`` in it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from mara.common.errors import UserError
from mara.deploy.paper.experiments import EXPERIMENTS, Experiment
from mara.deploy.paper.plan import Rates, assumptions, cost_in_words, cost_of
from mara.deploy.paper.scaled import TWINS


def find_experiment(name: str) -> Experiment:
    """The experiment ``name``.

    Raises:
        UserError: there is none of that name.
    """
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(EXPERIMENTS)}"
    raise UserError(f"no such experiment {name!r}; {remedy}")


def find_twin(name: str, seed: int) -> Experiment:
    """The experiment ``name`` on a small LLM, its trainings with ``seed``.

    Raises:
        UserError: there is no experiment of that name, or it has no twin.
    """
    find_experiment(name)
    if name not in TWINS:
        raise UserError(f"{name} has no scaled twin; {', '.join(TWINS)} have one")
    twin = TWINS[name]
    return Experiment(twin.title, lambda: twin.steps(seed), twin.notes)


def lines(experiment: Experiment, rates: Rates | None) -> Iterator[str]:
    """A shell script that makes ``experiment``; with ``rates`` the costs stand in its comments."""
    yield f"# {experiment.title}"
    yield "# Run it with mara on the PATH (PATH=$PWD/.venv/bin:$PATH); it ends where a command fails."
    yield "set -e"
    for note in experiment.notes:
        yield f"# {note}"
    yield "# Experiments share trainings: leave one out where the latest run in its run.dir is there already."
    total_s = gpu_s = 0.0
    num_counted = 0
    for step in experiment.steps():
        yield step.command
        if rates is None or (cost := cost_of(step, rates)) is None:
            continue
        yield f"#   {cost_in_words(cost)}"
        num_counted += 1
        total_s += cost.seconds
        gpu_s += cost.num_gpus * cost.seconds
    if rates is not None:
        yield (
            f"# in all {num_counted} runs: {total_s / 3600:.1f} h one after the other, "
            f"{gpu_s / 3600:.1f} GPU hours; benchmarks take minutes and are not counted"
        )
        yield from (f"# {line}" for line in assumptions(rates))
