"""How the program ends: exit statuses, and the errors behind them. Imports no torch."""

from __future__ import annotations

OK = 0
FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130


class RunFailed(Exception):
    """The run cannot go on: one line saying what died and where its log is. Exit status 1."""


def user_error(message: str) -> Exception:
    """A :class:`mara.common.contracts.UserError`, whose module takes seconds to import, made when needed."""
    from mara.common.contracts import UserError

    return UserError(message)


def is_user_error(error: BaseException) -> bool:
    """Whether ``error`` is a mistake the user can fix: message only, exit status 2."""
    from mara.common.contracts import UserError

    return isinstance(error, UserError)
