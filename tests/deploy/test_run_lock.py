"""Whether a run goes on, as others see it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mara.common.errors import UserError
from mara.deploy.run_lock import LOCK, hold_run, who_runs

HOLD = """
import sys, time
from pathlib import Path
from mara.deploy.run_lock import hold_run
with hold_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_is_seen_while_it_goes_on_and_keeps_others_out(tmp_path: Path) -> None:
    assert who_runs(tmp_path) is None
    with hold_run(tmp_path):
        assert (who_runs(tmp_path) or "").startswith(f"process {os.getpid()} on ")
        with pytest.raises(UserError, match=rf"in use: its run goes on \(process {os.getpid()} on .*wait"):
            hold_run(tmp_path).__enter__()
    assert who_runs(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    with hold_run(tmp_path):
        pass


def test_a_lock_whose_file_was_removed_meanwhile_is_the_lock_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits has the file open already that its holder removes at the end."""
    first = hold_run(tmp_path)
    first.__enter__()
    lock = fcntl.flock

    def ends_in_between(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        first.__exit__(None, None, None)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", ends_in_between)
    with hold_run(tmp_path):
        assert (who_runs(tmp_path) or "").startswith(f"process {os.getpid()} on ")
        with pytest.raises(UserError, match="in use"):
            hold_run(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_another_made_after_the_file_was_removed_stays(tmp_path: Path) -> None:
    first = hold_run(tmp_path)
    first.__enter__()
    (tmp_path / LOCK).unlink()  # by a person
    with hold_run(tmp_path):
        first.__exit__(None, None, None)
        assert who_runs(tmp_path) is not None
        with pytest.raises(UserError, match="in use"):
            hold_run(tmp_path).__enter__()


def test_of_many_who_want_to_run_one_does_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(20):
            with hold_run(tmp_path, 60.0, lambda _seconds: time.sleep(0.001)):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 80


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def has_none(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", has_none)
    with pytest.raises(
        UserError, match=r"^run\.dir: .* no file locks \(No locks available\); choose a folder"
    ):
        hold_run(tmp_path).__enter__()


def test_a_run_that_was_killed_is_over(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path.cwd()
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert (who_runs(tmp_path) or "").startswith(f"process {process.pid} on ")
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    assert who_runs(tmp_path) is None
    with hold_run(tmp_path):
        assert (who_runs(tmp_path) or "").startswith(f"process {os.getpid()} on ")
