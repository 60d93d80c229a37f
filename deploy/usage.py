"""Mistakes in the command itself: one line like all others, with where to read on."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from typer import BadParameter
from typer.core import TyperGroup

from mara.actors.config import DecodingConfig
from mara.common.addresses import hide_passwords
from mara.common.errors import UserError
from mara.deploy.exit import OK, USER_ERROR
from mara.deploy.output import complain

PROGRAM = "mara"

UsageError: Any = BadParameter.__base__
"""An unknown option, a missing argument, …: Typer has a public name for one kind of them alone."""


class CommandLine(TyperGroup):
    """The commands, without the boxes that Typer draws around a mistake."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` begin with; one that is not there is told with the nearest, or all."""
        if args and args[0] not in self.commands:
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(self.commands)}"
            ctx.fail(f"no such command {args[0]!r}; {remedy}")
        return super().resolve_command(ctx, args)

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
            if message := _in_words(error):
                where = f"`{' '.join(_command_path(self, args))} --help` shows what can be given"
                complain(f"{PROGRAM}: error: {hide_passwords(message)}; {where}")
            sys.exit(USER_ERROR)
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else OK)


def given_once(overrides: Sequence[str] | None) -> list[str]:
    """The ``key=value`` settings of a command, each of which is given once.

    Raises:
        UserError: one line for each that is not; names the key alone, for a value may be a password.
    """
    keys = Counter(override.partition("=")[0].strip() for override in overrides or [])
    if twice := [key for key, count in keys.items() if count > 1]:
        raise UserError(
            "\n".join(f"{key} is given {keys[key]} times; leave all but one of them out" for key in twice)
        )
    return list(overrides or [])


def check_used(overrides: Sequence[str], used: Sequence[str]) -> None:
    """Refuse ``key=value`` overrides of settings outside ``used``: they would change nothing.

    Raises:
        UserError: one line for each; names the key alone, for a value may be a password.
    """
    unused = [key for key in _keys(overrides) if not any(f"{key}.".startswith(f"{name}.") for name in used)]
    if unused:
        raise UserError(
            "\n".join(f"{key} changes nothing here; settings that do: {', '.join(used)}" for key in unused)
        )


def check_steering(
    overrides: Sequence[str],
    ways: Sequence[DecodingConfig],
    besides: Sequence[str] = (),
    *,
    remedy: str = "leave it out, or give decoding.steering={other}",
) -> None:
    """Refuse ``key=value`` overrides that change nothing in any of the ``ways`` in which agents are used, and
    more candidates to compare than there are.

    Args:
        besides: settings of ``decoding`` that are looked at for something else as well.
        remedy: what to do, where ``{other}`` is the other way to steer.

    Raises:
        UserError: one line for each.
    """
    keys = _keys(overrides)
    for way in ways:
        most = way.truncation.top_k
        if "decoding.num_compared" in keys and way.steering == "value" and way.num_compared > most:
            raise UserError(
                f"decoding.num_compared={way.num_compared} is more than the candidates that there are, "
                f"decoding.truncation.top_k={most}; lower it, or raise that"
            )
    if len({way.steering for way in ways}) != 1:
        return  # None, or both.
    way = ways[0]
    other = "value" if way.steering == "policy" else "policy"
    lines = []
    for key in keys:
        group, _, name = key.partition(".")
        if group != "decoding" or name not in way.idle or name in besides:
            continue
        bar = "the bar is decoding.min_advantage; or " if name == "threshold" else ""
        lines.append(f"{key} changes nothing by {way.steering}; {bar}{remedy.format(other=other)}")
    if lines:
        raise UserError("\n".join(lines))


def _keys(overrides: Sequence[str]) -> list[str]:
    return [override.partition("=")[0].strip() for override in overrides]


def _in_words(error: Any) -> str:
    """One line of a mistake in the words of the project's other messages; empty if the help was shown."""
    if near := getattr(error, "possibilities", None):
        return f"no such option: {error.option_name}; did you mean {' or '.join(sorted(near))}?"
    message = " ".join(error.format_message().split()).rstrip(".")
    # The values of options are checked by pydantic.
    message = message.replace("Input should be", "must be").partition(", unable to parse")[0]
    return message[:1].lower() + message[1:]


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
