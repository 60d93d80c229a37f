"""What can go wrong in a way that callers tell apart. Imports nothing."""


class UserError(Exception):
    """A mistake the user can fix: one line naming what, where and the remedy.

    The command line prints the message without a traceback and exits with status 2.
    """


class ReplayUnavailable(Exception):
    """The replay store did not answer within the time allowed; retrying later may work."""
