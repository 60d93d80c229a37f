"""What can go wrong in a way that callers tell apart. Imports nothing."""


class UserError(Exception):
    """A mistake the user can fix: one line naming what, where and the remedy.

    The command line prints the message without a traceback and exits with status 2.
    """


class DamagedWeights(Exception):
    """Published weights cannot be read or used; one line says why. Others may follow them."""

    def __init__(self, version: int, why: str) -> None:
        super().__init__(version, why)
        self.version = version
        self.why = why


class ReplayUnavailable(Exception):
    """The replay store did not answer within the time allowed; retrying later may work."""
