"""A Python function of the user's as a reward model.

Imports torch only where a model scores: a function is tried before a run in a process that has no need of it.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mara.common.errors import UserError

if TYPE_CHECKING:
    import torch

    from mara.common.contracts import Conversation

ScoreFunction = Callable[[list[str], list[str]], Sequence[float]]


TRIAL_PROMPTS = ("Why is the sky blue?", "How do I boil an egg?")
TRIAL_RESPONSES = (
    "Because air scatters blue light more than red light.",
    "Put it into boiling water for seven minutes.",
)


class FunctionFailed(Exception):
    """The user's function raised, or gave something else than scores; one line begins with the error's type.

    Any process can take it over from another, also one that cannot import the module of the error.
    """


class FunctionRewardModel:
    """Calls ``function(prompts, responses)`` for batches of at most ``batch_size``."""

    def __init__(self, function: ScoreFunction, batch_size: int) -> None:
        self._function, self._batch_size = function, batch_size

    def score(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """Return float32 [B], NaN where the function gave no finite number.

        Raises:
            FunctionFailed: it raised, wanted to end the process, or gave something else than its scores.
        """
        import torch

        scores: list[float] = []
        for start in range(0, len(conversations), self._batch_size):
            batch = conversations[start : start + self._batch_size]
            scores += _call(self._function, [c.prompt for c in batch], [c.response for c in batch])
        return torch.tensor(scores, dtype=torch.float32)


def _call(function: ScoreFunction, prompts: list[str], responses: list[str]) -> list[float]:
    num = len(prompts)
    try:
        scores = [float(score) for score in function(prompts, responses)]
    except SystemExit as error:
        raise FunctionFailed(f"SystemExit: the function exits with status {error}") from error
    except Exception as error:  # It can fail in any way.
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise FunctionFailed(f"{type(error).__name__}: {reason}") from error
    if len(scores) != num:
        raise FunctionFailed(f"ValueError: the function gave {len(scores)} scores for {num} conversations")
    return scores


def try_function(name: str, folder: Path) -> None:
    """Load the function ``MODULE:FUNCTION`` and have it score two short answers.

    Raises:
        UserError: it cannot be loaded, raises, or gives something else than a number for each.
    """
    function = load_function(name, folder)
    try:
        scores = _call(function, list(TRIAL_PROMPTS), list(TRIAL_RESPONSES))
    except FunctionFailed as error:
        raise UserError(f"function: {name!r} fails with two short answers ({error}); mend it") from error
    if not any(map(math.isfinite, scores)):
        raise UserError(f"function: {name!r} gives two short answers no finite score; mend it")


def load_function(name: str, folder: Path) -> ScoreFunction:
    """The function ``MODULE:FUNCTION``; modules are looked for in ``folder``, too, after those installed.

    Raises:
        UserError: there is no such module or function, or the module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # A module can fail in any way while it is imported.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"function: the module of {name!r} cannot be imported ({type(error).__name__}: {reason}); name "
            f"an installed module, or a file in {folder} without its .py"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(
            f"function: {name!r}: {module_name} has no function {attribute!r}; name one that takes prompts "
            "and responses"
        )
    return function  # type: ignore[no-any-return]
