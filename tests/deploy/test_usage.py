"""Mistakes in the command itself: a line that says what and where to read on, status 2."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from typer.testing import CliRunner

from mara.deploy.cli import app


@pytest.mark.parametrize(
    ("command", "mistake", "help_of"),
    [
        ("train quickstart --num-actors=2", "no such option: --num-actors", "mara train"),
        ("train quickstart --dry-rum", "no such option: --dry-rum; did you mean --dry-run?", "mara train"),
        ("train quickstart --dry-run=3", "option '--dry-run' does not take a value", "mara train"),
        ("train", "missing argument 'CONFIG'", "mara train"),
        ("train quickstart --resume runs/1", "settings of runs/1, leave out 'quickstart'", "mara train"),
        ("generate runs/latest", "missing argument 'PROMPT'", "mara generate"),
        ("trian quickstart", "no such command 'trian'; did you mean train?", "mara"),
        ("--quiet train", "no such option: --quiet", "mara"),
        ("reward fti", "no such command 'fti'; did you mean fit?", "mara reward"),
        (
            "bench foo",
            "no such command 'foo'; there are decode, rollout, replay, weights, learner",
            "mara bench",
        ),
        (
            "bench decode r --batch 0",
            "invalid value for '--batch': must be greater than or equal to 1",
            "mara bench decode",
        ),
        ("bench rollout r --rounds x", "'--rounds': must be a valid integer", "mara bench rollout"),
        ("reward fit --pairs p.jsonl", "missing option '--out'", "mara reward fit"),
        ("reward fit --pairs", "option '--pairs' requires an argument", "mara reward fit"),
    ],
)
def test_a_mistake_in_the_command_is_a_line_with_where_to_read_on(
    command: str, mistake: str, help_of: str
) -> None:
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("mara: error: ") and "Input" not in line
    assert f"{mistake}; `{help_of} --help` shows what can be given" in line
    assert CliRunner().invoke(app, [*help_of.split()[1:], "--help"]).exit_code == 0


def test_a_command_with_line_breaks_and_a_password_in_it_is_still_one_line_without_it() -> None:
    result = CliRunner().invoke(app, ["redis://:s3cret@host\nmore"])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "s3cret" not in result.output


@pytest.mark.parametrize("command", ["", "reward"])
def test_no_command_at_all_shows_the_help(command: str) -> None:
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2
    assert "Usage: " in result.output and "--help" in result.output
    assert "error" not in result.output


def test_the_status_of_a_command_is_that_of_the_program() -> None:
    assert CliRunner().invoke(app, ["train", "quickstart", "--dry-run"]).exit_code == 0
    shown = CliRunner().invoke(app, ["--version"])
    assert (shown.exit_code, shown.output) == (0, f"mara {metadata.version('mara-rl')}\n")
    assert CliRunner().invoke(app, ["train", "nowhere"]).exit_code == 2
    command = [sys.executable, "-m", "mara.deploy.cli", "train", "quickstart", "--none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mara: error: no such option: --none; ")
