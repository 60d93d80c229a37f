"""Ctrl-C, SIGTERM and SIGHUP: the first asks the run to end and save, the second ends it at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from mara.deploy import exit as exits

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """Catches SIGINT, SIGTERM and SIGHUP while it is entered. Enter it in the main thread.

    A SIGHUP that is ignored, as under ``nohup``, stays ignored.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._interrupts = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._first is not None

    @property
    def exit_status(self) -> int:
        """What the shell gives a program that such a signal ends, 128 and its number; 0 if none has come.

        A script must not go on with what was cut short, though it is saved.
        """
        return exits.OK if self._first is None else exits.SIGNALLED + self._first

    def interrupt_from_here(self) -> None:
        """From now on the first signal interrupts too: there is nothing left that must be saved.

        Raises:
            KeyboardInterrupt: here and now, if a signal has come already; later, when one comes.
        """
        self._interrupts = True
        if self.requested:
            raise KeyboardInterrupt

    def install(self) -> None:
        """Take the signals again. A library that is started in between may have put itself in our place."""
        for number in SIGNALS:
            if number != signal.SIGHUP or self._previous[number] != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def __enter__(self) -> Self:
        self._previous = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # A terminal that is closed is told twice, by the shell and by the system: nobody means it twice.
        if number == signal.SIGHUP and self.requested and not self._interrupts:
            return
        # Only sets a flag: a handler runs between any two instructions of the main thread, locks held.
        interrupts = self._interrupts or self.requested
        if self._first is None:
            self._first = number
        if interrupts:
            raise KeyboardInterrupt
