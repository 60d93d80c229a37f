"""A report for people: Markdown, one HTML page that needs nothing else, and the tables on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.markdown import Markdown

from mara.actors.evaluation import PreferenceRate
from mara.common.files import write_whole
from mara.deploy.comparison.report import Report

MISSING = "–"
NOT_RATES = ("a", "b", "dataset", "category", "num_prompts")
"""Keys of a pair in the report that name no judge."""
Figure = tuple[str, str, Callable[[Any], str]]
FIGURES: tuple[Figure, ...] = (
    ("perplexity", "perplexity", "{:.2f}".format),
    ("relevance", "relevance", "{:.2f}".format),
    ("distinct-1", "distinct_1", "{:.3f}".format),
    ("distinct-2", "distinct_2", "{:.3f}".format),
    ("distinct-3", "distinct_3", "{:.3f}".format),
    ("repeated 4-grams", "repetition", "{:.1%}".format),
    ("changed", "interventions", "{:.1%}".format),
    ("tokens", "mean_tokens", "{:.1f}".format),
    ("ended itself", "eos_share", "{:.0%}".format),
    ("tokens/s", "tokens_per_s", "{:.1f}".format),
)
"""Heading, key in the report, and how the number is written."""
NOT_IN_SUMMARY = ("distinct_1", "distinct_3")
"""Keys of figures for which a terminal has no room."""


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write ``report.json``, ``report.md`` and ``report.html`` into ``folder``; their paths.

    Raises:
        OSError: one cannot be written.
    """
    contents = {
        "report.json": json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": markdown(report),
        "report.html": html(report),
    }
    for name, text in contents.items():
        write_whole(folder / name, text)
    return [folder / name for name in contents]


def print_summary(report: Report) -> None:
    """Show the tables, without categories and samples."""
    console = Console(width=None if Console().is_terminal else 110)
    console.print(Markdown(markdown(report, is_summary=True)))


def markdown(report: Report, *, is_summary: bool = False) -> str:
    """The report as Markdown. Answers are indented, so that nothing in them is taken for markup."""
    environment = _environment(is_html=False)
    environment.filters["cell"] = _cell
    environment.filters["indented"] = _indented
    return environment.get_template("report.md.j2").render(
        **_content(report, is_summary=is_summary), is_summary=is_summary
    )


def html(report: Report) -> str:
    """The report as one HTML page without scripts, fonts or pictures from elsewhere."""
    return _environment(is_html=True).get_template("report.html.j2").render(**_content(report))


def _environment(*, is_html: bool) -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=is_html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _content(report: Report, *, is_summary: bool = False) -> dict[str, Any]:
    figures = [of for of in FIGURES if not (is_summary and of[1] in NOT_IN_SUMMARY)]
    return {
        "report": report,
        "juries": report["juries"],
        "rates": list(_rates(report["pairs"])),
        "category_rates": list(_rates(report["categories"])),
        "headings": [heading for heading, _, _ in figures],
        "figures": partial(_figures, figures),
        "score": _score,
        "settings": yaml.safe_dump(report["settings"], sort_keys=False, allow_unicode=True, width=100),
    }


def _rates(pairs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row of the table of preference rates for each pair and judge."""
    for pair in pairs:
        for judge, rate in pair.items():
            if judge in NOT_RATES:
                continue
            yield {
                **{key: pair.get(key, "") for key in NOT_RATES},
                "judge": judge,
                "rate": f"{rate['rate']:+.1%}",
                "interval": PreferenceRate(**rate).interval(),
                **{key: rate[key] for key in ("wins", "ties", "losses")},
            }


def _score(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.3f}"


def _figures(figures: Sequence[Figure], system: dict[str, Any]) -> list[str]:
    return [MISSING if system[key] is None else form(system[key]) for _, key, form in figures]


def _cell(text: object) -> str:
    """Text for a cell of a Markdown table: one line, without what would end the cell or begin markup."""
    line = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in r"\`*_[]<>|#" else letter for letter in line)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in (text.strip() or "(empty)").splitlines())
