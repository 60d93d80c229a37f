"""What a benchmark says: figures with their peers and conditions, for people and as JSON. Imports torch
late."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from rich.console import Console
from rich.table import Table

from mara.common.config import Config
from mara.common.errors import UserError


class Figure(Config):
    """One figure, as ``mara bench NAME --json FILE`` writes it."""

    figure: str
    """Its name; does not change between versions."""
    value: float
    """Ours, in ``unit``: the median of the rounds."""
    unit: str
    peer: str | None = None
    """What it is compared with."""
    ratio: float | None = None
    """Ours over the peer's; above 1 is better. The median of the ratios of the rounds."""
    conditions: dict[str, Any] = Field(default_factory=dict)
    """Hardware, sizes, and the peer's value."""


class Rounds(NamedTuple):
    """Values of two sides, measured in turn: noise of the machine falls on both."""

    ours: list[float]
    peers: list[float]

    @property
    def ratio(self) -> float:
        """Median of ours over the peer's, round by round."""
        return statistics.median(one / other for one, other in zip(self.ours, self.peers, strict=True))


def in_turn(ours: Callable[[int], float], peer: Callable[[int], float], num_rounds: int) -> Rounds:
    """Measure both sides ``num_rounds`` times, one after the other, the first one changing each round.

    Each side gets the number of the round, from 0. Warm up before.
    """
    rounds = Rounds([], [])
    for number in range(num_rounds):
        sides = [(rounds.ours, ours), (rounds.peers, peer)]
        for values, measure in sides if number % 2 == 0 else reversed(sides):
            values.append(measure(number))
    return rounds


def machine() -> dict[str, Any]:
    """The hardware and the versions that a figure depends on."""
    import torch
    import transformers

    found: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    """Model name of the processor, and what torch uses of it."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else name}, {torch.backends.cpu.get_cpu_capability()}"


def check_json_path(path: Path | None) -> None:
    """Refuse a file that could not be written, before minutes are spent on what goes into it.

    Raises:
        UserError: it is a folder, its folder does not exist, or one of them cannot be written.
    """
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir():
        raise UserError(f"--json: {path} is a folder; give a file, such as {path / 'figures.json'}")
    if not folder.is_dir():
        raise UserError(f"--json: there is no folder {folder}; make it, or give a file in another")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"--json: {path} cannot be written; give another file")


SHOWN = (
    *("llm", "dtype", "device", "hidden_size", "batch_size", "capacity", "new_tokens", "top_k", "top_p"),
    *("rounds", "processor", "threads", "torch"),
)
"""Conditions that a person wants to see, in this order."""


def conditions_line(figures: Sequence[Figure]) -> str:
    """Those of the conditions in ``SHOWN`` that all figures share, in one line."""
    first, *others = [figure.conditions for figure in figures]
    shared = [
        name for name in SHOWN if name in first and all(other.get(name) == first[name] for other in others)
    ]
    return ", ".join(f"{name.replace('_', ' ')} {first[name]}" for name in shared)


def report(figures: Sequence[Figure], path: Path | None) -> None:
    """Print the figures, and write them to ``path`` as a JSON list."""
    console = Console(width=None if Console().is_terminal else 110)
    table = Table(title="Figures (medians; a ratio above 1 is better)")
    for column in ("figure", "ours", "peer", "unit", "ratio", "the peer is"):
        table.add_column(column, justify="right" if column in ("ours", "peer", "ratio") else "left")
    for figure in figures:
        peer_value = figure.conditions.get("peer_value")
        table.add_row(
            figure.figure,
            f"{figure.value:.3g}",
            "" if peer_value is None else f"{peer_value:.3g}",
            figure.unit,
            "" if figure.ratio is None else f"{figure.ratio:.2f}",
            figure.peer or "",
        )
    console.print(table)
    where = "" if path is not None else "; --json FILE keeps all conditions"
    console.print(
        conditions_line(figures) + where, highlight=False, markup=False, style="dim", soft_wrap=True
    )
    if path is not None:
        content = [figure.model_dump(mode="json") for figure in figures]
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        console.print(f"saved: {path}", highlight=False, markup=False)
