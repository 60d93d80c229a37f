"""Standard output that goes away: the work goes on."""

from __future__ import annotations

import os
import subprocess
import sys

from mara.deploy.output import SteadyOutput

WORK = """
import os, sys
from mara.deploy.output import open_missing_descriptors, steady_output
open_missing_descriptors()
with steady_output():
    for number in range(3):
        print("line", number, flush=True)
    assert os.open(os.devnull, os.O_RDONLY) > 2
    sys.stderr.write("done\\n")
"""


def run(redirection: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, WORK]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_full_disk_under_standard_output_is_told_once_and_the_work_goes_on() -> None:
    done = run("> /dev/full")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "mara: standard output is lost (No space left on device); the work goes on without it",
        "done",
    ]


def test_closed_standard_streams_are_no_reason_to_fail() -> None:
    done = run(">&-")
    assert (done.returncode, done.stderr) == (0, "done\n")


def test_a_reader_that_goes_away_ends_the_printing_only() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        output = SteadyOutput(pipe)
        output.write("nobody reads this\n")
        output.flush()
        output.write("nor this\n")
        output.flush()
