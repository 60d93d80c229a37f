"""``mara reward fit``: what reaches the fit, and what is said about its outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mara.actors.config import LLMConfig
from mara.actors.head_config import FitConfig, FitReport, Share
from mara.deploy.cli import app

REPORT = FitReport(
    name="helpful",
    llm="m",
    pairs="p",
    num_pairs=100,
    num_shared_answers=0,
    num_too_long=0,
    num_fit=80,
    num_held_out=20,
    accuracy=0.75,
    accuracy_low=0.7,
    accuracy_high=0.8,
    prefix_accuracy={8: 0.6},
    robustness={"shuffled": Share(share=0.99, num=200)},
    base_scores={"sampled": 0.0},
    length_slope=0.0,
    seconds=3.0,
)


def fit(folder: Path, *arguments: str) -> Result:
    command = ["reward", "fit", "--pairs", "pairs.json", "--name", "helpful", "--out", str(folder / "head")]
    return CliRunner().invoke(app, [*command, *arguments])


def test_options_and_overrides_reach_the_fit_and_its_figures_are_printed(
    tmp_path: Path, llm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fake_fit(llm: LLMConfig, config: FitConfig, out: Path, progress: Any) -> FitReport:
        asked.extend((llm, config, out))
        progress("reading", 1, 1)
        return REPORT

    monkeypatch.setattr("mara.actors.head_fit.fit_from_files", fake_fit)
    result = fit(tmp_path, "--llm", str(llm_folder), "llm.dtype=float32", "share=0,0.65", "ridge=1e-3")
    assert result.exit_code == 0, result.output
    llm, config, out = asked
    assert (llm.model, llm.dtype, out) == (str(llm_folder), "float32", tmp_path / "head")
    assert type(config) is FitConfig
    assert (config.pairs, config.share, config.ridge) == ("pairs.json", (0, 0.65), 1e-3)
    for part in ("accuracy 75.0%", "70.0% to 80.0%", "shuffled", "99.0%", "reading: 1/1"):
        assert part in result.output


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("rigde=1", "did you mean ridge?"),
        ("share=0.5,0.1", "rising"),
        ("llm.dtype=int8", "llm.dtype"),
        ("llm.device=xyz", "llm.device=xyz"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, argument: str, part: str) -> None:
    result = fit(tmp_path, argument)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert part in result.stderr
