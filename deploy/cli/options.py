"""What several commands share: arguments, and mistakes as one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mara.common.addresses import hide_passwords
from mara.common.errors import UserError
from mara.deploy import exit as exits
from mara.deploy.output import complain
from mara.deploy.signals import StopSignal


def _settled(folder: Path) -> Path:
    from mara.deploy.run_folder import settled

    return settled(folder)


RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/latest.", callback=_settled)
]


@contextmanager
def reported_errors() -> Iterator[None]:
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


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """Say that nothing was saved where a signal ends what is within."""
    with StopSignal() as stop:
        stop.interrupt_from_here()
        try:
            yield
        except KeyboardInterrupt:
            _complain("interrupted; nothing was saved")
            raise typer.Exit(stop.exit_status or exits.INTERRUPTED) from None


def _complain(message: str) -> None:
    for line in hide_passwords(message).splitlines():
        complain(f"mara: error: {line}")
