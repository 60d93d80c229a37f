"""Standard output that may go away: a closed pipe, a lost terminal or a full disk ends the printing only."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class SteadyOutput:
    """A text stream whose failure is told once on standard error; what is written afterwards is dropped.

    Everything but writing is the stream's own.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """Write to ``stream``; None is what Python has where the descriptor was closed from the start."""
        self._stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115
        self._lost = False

    def write(self, text: str) -> int:
        """Write unless the output is lost. Never raises an OSError."""
        if not self._lost:
            try:
                self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush unless the output is lost. Never raises an OSError."""
        if not self._lost:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        self._lost = True
        # What is buffered still would fail again, at the latest when the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        complain(f"mara: standard output is lost ({error.strerror or error}); the work goes on without it")


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Let work go on when nobody can read its standard output any more."""
    previous = sys.stdout
    sys.stdout = SteadyOutput(previous)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = previous


def complain(line: str) -> None:
    """Write a line to standard error, if there is one."""
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def open_missing_descriptors() -> None:
    """Point closed standard streams to nowhere: the next file or socket would get their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
