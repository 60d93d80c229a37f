"""The ``mara`` command. Heavy imports wait until a command needs them: ``--help`` is instant."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated

import typer

from mara.deploy.cli import bench, experiments, runs, store
from mara.deploy.output import open_missing_descriptors
from mara.deploy.usage import CommandLine

app = typer.Typer(
    cls=CommandLine,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Align a frozen language model: a small agent accepts or rejects its tokens.",
)
app.command()(runs.train)
app.command("eval")(runs.evaluate)
app.command()(runs.generate)
app.command()(runs.calibrate)
app.command()(experiments.paper)
app.command()(runs.export)
app.command("import")(runs.import_released)
app.add_typer(experiments.reward_app, name="reward")
app.add_typer(bench.bench_app, name="bench")
app.add_typer(experiments.baseline_app, name="baseline")
app.add_typer(store.store_app, name="store")


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


def _bound_spinning() -> None:
    """Let threads of OpenMP that wait for others of their process sleep soon, unless the user says otherwise.

    Without a bound they keep their cores while the others wait for one, on a machine with other work
    (`docs/decisions.md`). Must be there before torch is loaded; Ray's processes get it from here.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main() -> None:
    """Entry point of the console script."""
    open_missing_descriptors()
    _bound_spinning()
    app()
