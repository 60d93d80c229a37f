"""What a run says of itself while something is waited for, and hearing meanwhile that it should stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from mara.deploy.console import Display, View
from mara.deploy.signals import StopSignal

TICK_S = 0.05


class StoppedEarly(Exception):
    """A signal came before there was anything to save."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The display together with the wish to stop: both matter whenever something is waited for."""

    view: View
    display: Display
    stop: StopSignal

    def state(self, state: str) -> None:
        """Say what is done next.

        Raises:
            StoppedEarly: a signal has come.
        """
        self.view.state = state
        self.display.refresh()
        if self.stop.requested:
            raise StoppedEarly

    def pause(self, seconds: float) -> None:
        """Wait, but no longer than to the first signal."""
        until = time.monotonic() + seconds
        while not self.stop.requested and time.monotonic() < until:
            time.sleep(TICK_S)

    def wait_out(self, what: str) -> Callable[[float], None]:
        """A function that waits for some seconds of all the waiting for ``what``, and says so.

        It raises :class:`StoppedEarly` once a signal has come.
        """

        def pause(seconds: float) -> None:
            self.state(f"waiting for {what}")
            self.pause(seconds)

        return pause

    def wait_for(self, work: Callable[[], None], *, may_be_left: bool = False) -> None:
        """Do ``work`` in another thread, with the display alive and signals heard; raise what it raises.

        Raises:
            StoppedEarly: a signal has come, and the work ``may_be_left`` undone.
        """
        errors: list[BaseException] = []

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        while thread.is_alive():
            self.display.refresh()
            if may_be_left and self.stop.requested:
                raise StoppedEarly
            thread.join(TICK_S)
        if errors:
            raise errors[0]
