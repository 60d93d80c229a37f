"""``mara reward fit``: settings from the command line, progress, and what the fit gave."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mara.actors.config import LLMConfig
from mara.actors.head_config import FitConfig, FitReport
from mara.deploy.config_file import make_settings
from mara.deploy.console import say

SAY_EVERY_S = 10.0


class FitSettings(FitConfig):
    """A fit together with the LLM it is for."""

    llm: LLMConfig
    """The LLM on whose hidden states the head works."""


def fit_settings(
    pairs: str, name: str, llm: str, prompts: Path | None, overrides: Sequence[str]
) -> FitSettings:
    """Settings of a fit: ``key=value`` for those of the fit itself, ``llm.key=value`` for the LLM's.

    Raises:
        UserError: one line for each mistake.
    """
    content: dict[str, Any] = {"pairs": pairs, "name": name, "llm": {"model": llm}}
    if prompts is not None:
        content["prompts"] = str(prompts)
    return make_settings(FitSettings, content, overrides, folder=Path.cwd())


def fit(settings: FitSettings, out: Path) -> FitReport:
    """Fit a head, save it with its card in ``out``, and print what it is worth.

    Raises:
        UserError: pairs, prompts or LLM cannot be read, its device is not there, or ``out`` cannot be
            written.
    """
    from mara.actors.head_fit import fit_from_files
    from mara.actors.llm import resolve_device
    from mara.deploy.model_shape import check_llm_template
    from mara.deploy.preflight import check_writable

    check_writable("--out", out.absolute())
    resolve_device(settings.llm.device)
    check_llm_template(settings.llm)
    config = FitConfig.model_validate(settings.model_dump(exclude={"llm"}))
    report = fit_from_files(settings.llm, config, out, _Progress().tell)
    print_report(report)
    say(f"saved: {out}")
    return report


def print_report(report: FitReport) -> None:
    """Accuracy with its interval, and how the real text fares against broken versions of it."""
    console = Console(width=None if Console().is_terminal else 110)
    console.print(
        f"{report.name}: held-out pairwise accuracy {report.accuracy:.1%} "
        f"(95 % interval {report.accuracy_low:.1%} to {report.accuracy_high:.1%}), "
        f"{report.num_held_out} pairs; fitted to {report.num_fit} pairs in {report.seconds:.0f} s",
        highlight=False,
    )
    table = Table(title="The real text scores higher than")
    table.add_column("its broken version")
    table.add_column("share", justify="right")
    table.add_column("comparisons", justify="right")
    for kind, share in report.robustness.items():
        table.add_row(kind, f"{share.share:.1%}", str(share.num))
    console.print(table)


class _Progress:
    """A line at each new step and every ten seconds."""

    def __init__(self) -> None:
        self._what = ""
        self._said_s = float("-inf")

    def tell(self, what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if what != self._what or now_s - self._said_s >= SAY_EVERY_S or done == total:
            self._what, self._said_s = what, now_s
            say(f"  {what}: {done}/{total}")
