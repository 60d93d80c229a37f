"""How the program ends: exit statuses, and the errors behind them. Imports no torch."""

from __future__ import annotations

OK = 0
FAILED = 1
USER_ERROR = 2
SIGNALLED = 128
INTERRUPTED = 130


class RunFailed(Exception):
    """The run cannot go on: one line saying what died and where its log is. Exit status 1."""
