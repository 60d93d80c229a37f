"""Mistakes in the command itself: one line like all others, and one more that says where to read on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from typer import BadParameter
from typer.core import TyperGroup

from mara.common.addresses import hide_passwords
from mara.deploy.exit import OK, USER_ERROR
from mara.deploy.output import complain

PROGRAM = "mara"

UsageError: Any = BadParameter.__base__
"""An unknown option, a missing argument, …: Typer has a public name for one kind of them alone."""


class CommandLine(TyperGroup):
    """The commands, without the boxes that Typer draws around a mistake."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command that ``args`` name and exit with its status; see ``TyperGroup.main``."""
        args = sys.argv[1:] if args is None else args
        try:
            status = super().main(
                args, prog_name or PROGRAM, complete_var, False, windows_expand_args, **extra
            )
        except UsageError as error:
            if not standalone_mode:
                raise
            # Nothing is left to say where nothing was asked for: the help has been shown.
            if message := " ".join(error.format_message().split()).rstrip("."):
                complain(f"{PROGRAM}: error: {hide_passwords(message[0].lower() + message[1:])}")
                complain(f"`{' '.join(_command_path(self, args))} --help` shows what can be given")
            sys.exit(USER_ERROR)
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else OK)


def _command_path(group: TyperGroup, args: Sequence[str]) -> list[str]:
    """The words with which ``args`` begin that are commands, after the program's name."""
    path: list[str] = [PROGRAM]
    command: Any = group
    for word in args:
        if not isinstance(command, TyperGroup) or word not in command.commands:
            break
        path.append(word)
        command = command.commands[word]
    return path
