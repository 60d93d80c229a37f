"""`mara bench`: each figure of this machine against a peer, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mara.deploy.cli.options import RunFolder, reported_errors
from mara.deploy.output import steady_output
from mara.deploy.usage import CommandLine, given_once

bench_app = typer.Typer(
    cls=CommandLine,
    no_args_is_help=True,
    help="Measure this machine: each figure against a peer, in one run.",
)

BenchOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as decoding.mode=wide."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures there.", metavar="FILE")]
NumRounds = Annotated[int, typer.Option("--rounds", min=1, help="Times each side is measured.")]


@bench_app.command("decode")
def bench_decode(
    run: RunFolder,
    overrides: BenchOverrides = None,
    json_file: JsonFile = None,
    num_rounds: NumRounds = 3,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Prompts at a time; may be repeated.  [1, 16]")
    ] = None,
) -> None:
    """Greedy decoding with the agent of a run against plain generate() of its LLM."""
    with reported_errors():
        from mara.deploy.bench.runs import decode

        with steady_output():
            decode(run, given_once(overrides), json_file, num_rounds, batches or [1, 16])


@bench_app.command("rollout")
def bench_rollout(
    run: RunFolder,
    overrides: BenchOverrides = None,
    json_file: JsonFile = None,
    num_rounds: NumRounds = 3,
    peer_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts that the peer, which is slow, answers in a round.")
    ] = 1,
) -> None:
    """Rollouts with the agent of a run, at the paper's k and p, against the paper's procedure."""
    with reported_errors():
        from mara.deploy.bench.runs import rollout

        with steady_output():
            rollout(run, given_once(overrides), json_file, num_rounds, peer_prompts)


@bench_app.command("replay")
def bench_replay(
    json_file: JsonFile = None,
    num_rounds: NumRounds = 5,
    hidden_size: Annotated[int, typer.Option(min=1, help="Of the LLM.")] = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Transitions of a sample.")] = 1024,
    ring_mib: Annotated[int, typer.Option(min=1, help="States to sample from, MiB.")] = 512,
) -> None:
    """Sampling against a bare gather, TorchRL and cpprb; writing against raw Redis."""
    with reported_errors():
        from mara.deploy.bench.replay import Sizes
        from mara.deploy.bench.replay import bench_replay as measure
        from mara.deploy.console import say

        with steady_output():
            measure(Sizes(hidden_size, batch_size, ring_mib << 20), num_rounds, json_file, say)


@bench_app.command("weights")
def bench_weights(
    json_file: JsonFile = None,
    num_rounds: NumRounds = 3,
    subscribers: Annotated[int, typer.Option(min=1, help="Who wait for the weights.")] = 32,
) -> None:
    """From the publication of an agent of the paper's size to its use by many subscribers."""
    with reported_errors():
        from mara.deploy.bench.replay import WeightsSizes
        from mara.deploy.bench.replay import bench_weights as measure
        from mara.deploy.console import say

        with steady_output():
            measure(WeightsSizes(num_subscribers=subscribers), num_rounds, json_file, say)


@bench_app.command("learner")
def bench_learner(
    json_file: JsonFile = None,
    num_rounds: NumRounds = 3,
    hidden_size: Annotated[int, typer.Option(min=1, help="Of the LLM.")] = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Transitions of a gradient step.")] = 1024,
    capacity: Annotated[
        int, typer.Option(min=256, help="Transitions in the replay; fewer where memory is short.")
    ] = 1_000_000,
    precision: Annotated[
        Literal["float32", "tf32", "bfloat16"], typer.Option(help="As learner.sac.precision.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="As learner.device.")] = "auto",
    num_threads: Annotated[
        int, typer.Option("--threads", min=1, help="Of both sides' arithmetic, as learner.num_threads.")
    ] = 1,
) -> None:
    """A gradient step on a live log, against the authors' way and against the hardware's ceilings."""
    with reported_errors():
        from mara.deploy.bench.learner import bench_learner as measure
        from mara.deploy.bench.learner_step import LearnerSizes
        from mara.deploy.console import say

        sizes = LearnerSizes(
            hidden_size,
            batch_size,
            capacity=capacity,
            precision=precision,
            device=device,
            num_threads=num_threads,
        )
        with steady_output():
            measure(sizes, num_rounds, json_file, say)
