"""Commands about runs and their agents: train, eval, generate, calibrate, export, import."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mara.common.errors import UserError
from mara.deploy.cli.options import RunFolder, all_or_nothing, reported_errors
from mara.deploy.output import complain, steady_output
from mara.deploy.usage import UsageError, check_steering, check_used, given_once

TrainOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as rollout.num_actors=4."),
]
EvalOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as evaluation.num_prompts=50."),
]
GenerateOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as decoding.max_new_tokens=80."),
]
CalibrateOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as decoding.truncation.top_k=8."),
]
ExportOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="How to use the agent, such as decoding.min_advantage=0.2 of calibrate."
    ),
]
AgentOut = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder for the agent.")]
Trusted = Annotated[
    bool,
    typer.Option("--trust", help="Call the functions and servers that the folder of somebody else names."),
]


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or the name of a shipped one: quickstart, paper/llama-3.1-8b, …",
        ),
    ] = None,
    overrides: TrainOverrides = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Go on with a run that ended early, such as runs/latest, instead of starting CONFIG.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all that needs no start, print the resolved settings, stop."),
    ] = False,
    trust: Trusted = False,
) -> None:
    """Train an agent, then compare it with the LLM it steers.

    Ctrl-C saves the agent and ends with status 130; --resume goes on from there, or after a crash.
    """
    with reported_errors():
        from mara.deploy.config_file import dump_config, find_config, load_config

        resumed = None
        if resume is not None:
            from mara.deploy.console import warn
            from mara.deploy.resume import find_resumed

            changes = given_once([*([] if config is None else [config]), *(overrides or [])])
            if config is not None and "=" not in config:
                raise UsageError(f"--resume goes on with the settings of {resume}, leave out {config!r}")
            resumed = find_resumed(resume, changes, warn, is_trusted=trust)
            settings = resumed.config
        elif config is None:
            raise UsageError("missing argument 'CONFIG'")
        else:
            changes = given_once(overrides)
            settings = load_config(find_config(config), changes)
            # Training samples with these either way.
            check_steering(changes, [settings.decoding], besides=("fallback", "mode", "window"))
            if trust and settings.replay.from_run is None:
                raise UsageError("--trust belongs to --resume or replay.from; leave it out")
        if settings.replay.from_run is not None:
            from mara.deploy.finished_run import check_whose_episodes

            check_whose_episodes(settings, is_trusted=trust)
        if dry_run:
            from mara.deploy.preflight import preflight, settled

            preflight(settings, run_id=None if resumed is None else resumed.record.run_id)
            if sys.stdout is not None:
                sys.stdout.write(dump_config(settings))
                sys.stdout.flush()
            # Standard output is the settings alone: they can be kept as a configuration.
            if auto := [f"{name}={value}" for name, value in settled(settings, os.environ).items()]:
                complain(f"mara: what is auto comes to {', '.join(auto)} here")
            complain("mara: all checks passed; nothing was started")
            return
        from mara.deploy.train import train as run

        with steady_output():
            status = run(settings, resumed)
        raise typer.Exit(status)


def evaluate(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|CONFIG",
            help="Folder of a run, such as runs/latest; or a YAML file that says what to compare, or "
            "the name of a shipped one: compare.",
        ),
    ] = None,
    overrides: EvalOverrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="New folder for what is found; else that of RUN, or one in runs/ for CONFIG and an agent "
            "that was exported.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="FOLDER", help="Go on with a comparison that ended early."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check CONFIG and all it names, print the resolved settings, stop."),
    ] = False,
    trust: Trusted = False,
) -> None:
    """Compare the agent of a run with the LLM alone; or systems, data sets and judges as CONFIG says.

    Ctrl-C ends a comparison and keeps all that it has found; --resume goes on from there, or after a crash.
    """
    with reported_errors():
        from mara.deploy.config_file import is_config

        changes = list(overrides or [])
        if what is not None and resume is not None and "=" in what:
            changes.insert(0, what)
            what = None
        changes = given_once(changes)
        if resume is not None or (what is not None and is_config(what)):
            if trust and what is not None:
                raise UsageError(f"--trust belongs to a folder, {what} is a configuration; leave it out")
            _compare(what, changes, out, resume, dry_run, trust)
            return
        if what is None:
            raise UsageError("missing argument 'RUN|CONFIG'")
        _evaluate_run(Path(what), changes, out, dry_run, trust)


def _evaluate_run(run: Path, overrides: list[str], out: Path | None, dry_run: bool, trust: bool) -> None:
    from mara.deploy.comparison.config import RECORD
    from mara.deploy.config_file import near_config
    from mara.deploy.console import warn
    from mara.deploy.run_folder import check_agent, check_called, load_use, settled
    from mara.deploy.run_lock import who_runs

    run = settled(run)
    if (run / RECORD).is_file():
        raise UserError(f"{run} is the folder of a comparison; `mara eval --resume {run}` goes on with it")
    if not run.exists() and (near := near_config(str(run))) is not None:
        raise UserError(f"there is no run {str(run)!r}, and no configuration; did you mean {near}?")
    if not run.exists() and run.name == str(run):
        raise UserError(
            f"there is no run {str(run)!r}, and no configuration; give the folder of a run, such as "
            "runs/latest, or a configuration, such as compare"
        )
    if dry_run:
        raise UsageError(
            f"--dry-run belongs to a comparison; leave it out, or give a YAML file in place of {run}"
        )
    settings = load_use(run, overrides)
    check_agent(run)
    check_called(run, settings, is_trusted=trust)
    from mara.deploy.evaluation import EVALUATION_USES, run_evaluation

    check_used(overrides, EVALUATION_USES)
    check_steering(overrides, [settings.decoding])
    if (process := who_runs(run)) is not None:
        warn(f"{run} goes on ({process}); what is judged is the agent that it saved last")
    with steady_output(), all_or_nothing():
        run_evaluation(run, settings, out=out)


def _compare(
    config: str | None,
    overrides: list[str],
    out: Path | None,
    resume: Path | None,
    dry_run: bool,
    trust: bool,
) -> None:
    from mara.deploy.comparison.run import Place, check_resumed, check_same, compare, resumed_settings
    from mara.deploy.config_file import dump_comparison, find_config, load_comparison

    if out is not None and resume is not None:
        raise UsageError("--out makes a new folder, --resume goes on in one; give one of them")
    if resume is not None:
        check_resumed(resume)
    if config is None:
        assert resume is not None
        settings = resumed_settings(resume, overrides, is_trusted=trust)
    else:
        settings = load_comparison(find_config(config, is_comparison=True), overrides)
    remedy = "leave it out, or use an agent so: systems.NAME.steering={other}"
    check_steering(overrides, settings.ways, remedy=remedy)
    if dry_run:
        from mara.deploy.comparison.checks import check
        from mara.deploy.comparison.results import Results
        from mara.deploy.preflight import check_out

        if out is not None:
            check_out(out)
        checked = check(settings, kept=None if resume is None else Results(resume))
        if resume is not None:
            check_same(resume, checked)
        if sys.stdout is not None:
            sys.stdout.write(dump_comparison(settings))
            sys.stdout.flush()
        complain("mara: all checks passed; nothing was started")
        return
    with steady_output():
        status = compare(settings, Place(out, resume))
    raise typer.Exit(status)


def generate(
    run: RunFolder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")],
    overrides: GenerateOverrides = None,
) -> None:
    """Answer a prompt with the LLM alone and with the agent of a run, or an exported one."""
    with reported_errors():
        from mara.deploy.run_folder import check_agent, load_use

        overrides = given_once(overrides)
        settings = load_use(run, overrides)
        check_agent(run)
        from mara.deploy.evaluation import GENERATION_USES
        from mara.deploy.evaluation import generate as answer

        check_used(overrides, GENERATION_USES)
        check_steering(overrides, [settings.decoding])
        with steady_output():
            answer(run, settings, prompt)


def calibrate(
    run: RunFolder,
    overrides: CalibrateOverrides = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts to try on. By default those the agent was trained on."),
    ] = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=8, help="Use the first so many.")] = 100,
    max_interventions: Annotated[
        float,
        typer.Option(min=0.0, help="How often it may step in at most, against the same agent by policy."),
    ] = 0.5,
    trust: Trusted = False,
) -> None:
    """Find how to use the agent: settings that gain most at so many interventions at most."""
    with reported_errors():
        from mara.deploy.run_folder import check_agent, check_called, load_use

        changes = given_once(overrides)
        settings = load_use(run, changes)
        check_agent(run)
        check_called(run, settings, is_trusted=trust)
        from mara.deploy.calibration import CALIBRATION_USES
        from mara.deploy.calibration import calibrate as find_gate

        check_used(changes, CALIBRATION_USES)
        # Both ways are tried.
        by_value = settings.decoding.model_copy(update={"steering": "value"})
        check_steering(changes, [by_value, settings.decoding.model_copy(update={"steering": "policy"})])
        with steady_output(), all_or_nothing():
            find_gate(run, settings, prompts, num_prompts, max_interventions)


def export(run: RunFolder, out: AgentOut, overrides: ExportOverrides = None) -> None:
    """Write the agent of a run as a folder to hand on, which eval and generate take like a run.

    Settings say how it is to be used, else it is as in its run.
    """
    with reported_errors():
        from mara.deploy.run_folder import agent_folder, check_agent, load_use

        changes = given_once(overrides)
        settings = load_use(run, changes)
        check_agent(run)
        if agent_folder(run) == run and not changes:
            raise UserError(f"{run} is an exported agent; copy the folder, or say how to use it otherwise")
        from mara.deploy.exchange import EXPORT_USES, export_agent

        check_used(changes, EXPORT_USES)
        check_steering(changes, [settings.decoding])
        export_agent(run, settings, out)


def import_released(
    file: Annotated[Path, typer.Argument(metavar="FILE.pth", help="State dict that the authors released.")],
    out: AgentOut,
    llm: Annotated[str, typer.Option(help="The LLM that the agent was trained for.", metavar="MODEL")],
    overrides: GenerateOverrides = None,
) -> None:
    """Convert an agent that the paper's authors released into a folder as export writes it."""
    with reported_errors():
        from mara.deploy.evaluation import GENERATION_USES
        from mara.deploy.exchange import import_agent, import_settings

        overrides = given_once(overrides)
        check_used(overrides, GENERATION_USES)
        settings = import_settings(llm, overrides)
        if settings.decoding.steering == "policy":  # The other is refused: it needs a critic.
            check_steering(overrides, [settings.decoding], remedy="leave it out")
        import_agent(file, settings, out)
