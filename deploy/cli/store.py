"""`mara store`: what runs have left on a server."""

from __future__ import annotations

from typing import Annotated

import typer

from mara.deploy.cli.options import reported_errors
from mara.deploy.usage import CommandLine

store_app = typer.Typer(
    cls=CommandLine, no_args_is_help=True, help="What runs have left on your Redis or Valkey server."
)

StoreUrl = Annotated[str, typer.Argument(metavar="URL", help="Address of the server, as replay.redis_url.")]


@store_app.command("list")
def store_list(url: StoreUrl) -> None:
    """Show the runs that have episodes or weights on a server, how much, and who uses them."""
    with reported_errors():
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
    with reported_errors():
        from mara.deploy.stored_runs import delete_runs

        delete_runs(url, runs, is_meant=yes)
