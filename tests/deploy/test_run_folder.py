"""Run folders and the pictures in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mara.common.agent import Agent, save_agent
from mara.common.config import AgentConfig
from mara.common.errors import UserError
from mara.deploy.config import RunConfig
from mara.deploy.config_file import dump_config
from mara.deploy.plots import (
    CANDIDATES_PLOT,
    accepted_positions,
    draw_plots,
    draw_positions_by_candidates,
    llm_levels,
    positions_by_candidates,
    read_metrics,
    reward_curve,
)
from mara.deploy.run_folder import check_agent, load_run, make_run_folder, name_latest


def save_trained(folder: Path, gradient_steps: int, policy_steps: int) -> None:
    card = {"training": {"gradient_steps": gradient_steps, "policy_steps": policy_steps}}
    save_agent(Agent(4, AgentConfig(widths=(4, 4))), folder / "agent", card)


def test_a_run_folder_holds_the_settings(config: RunConfig) -> None:
    folder = make_run_folder(config)
    assert folder.name.startswith("tiny-2")
    assert load_run(folder) == config
    assert load_run(folder, ["learner.batch_size=7"]).learner.batch_size == 7


def test_latest_is_the_newest_run_with_an_agent_that_learnt(config: RunConfig) -> None:
    latest = config.run.dir / "latest"
    first = make_run_folder(config)
    assert not name_latest(first)
    with pytest.raises(UserError, match=f"{latest} is not there: no run in {config.run.dir} has saved"):
        load_run(latest)
    for gradient_steps in (0, 100):
        save_trained(first, gradient_steps, policy_steps=0)
        assert not name_latest(first)
    save_trained(first, gradient_steps=101, policy_steps=1)
    assert name_latest(first)
    assert load_run(latest) == config

    second = make_run_folder(config)
    assert not name_latest(second)
    assert latest.resolve() == first
    save_trained(second, gradient_steps=1, policy_steps=1)
    assert name_latest(second)
    assert latest.resolve() == second
    assert not list(config.run.dir.glob(".latest*"))


def test_a_run_without_an_agent_is_named_by_its_own_name(config: RunConfig) -> None:
    folder = make_run_folder(config)
    link = folder.with_name("mine")
    link.symlink_to(folder)
    with pytest.raises(UserError, match=f"{folder} has no agent"):
        check_agent(link)
    (folder / "agent").mkdir()
    check_agent(link)


def test_two_runs_of_the_same_second_have_folders_of_their_own(config: RunConfig) -> None:
    first, second = make_run_folder(config, now_s=0), make_run_folder(config, now_s=0)
    assert second.name == first.name + "-2"


def test_a_run_folder_that_cannot_be_made_is_told(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(UserError, match=r"run\.dir="):
        make_run_folder(config)


def write(folder: Path, rows: list[dict[str, float | None]], tail: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_the_plots_show_reward_scores_and_positions(tmp_path: Path) -> None:
    rows: list[dict[str, float | None]] = [{"time_s": 0.0, "episodes/total": 0.0}]
    for n in range(1, 9):
        rows.append(
            {
                "episodes/total": 10.0 * n,
                "episode/reward": 0.1 * n,
                "episode/score/helpful": None if n == 3 else 1.0 * n,
                "episode/accepted_rank_0": 0.7,
                "episode/accepted_rank_1": 0.2,
                "episode/accepted_rank_rest": 0.1,
            }
        )
    write(tmp_path, rows)
    files = draw_plots(tmp_path, top_k=5)
    assert [file.name for file in files] == ["reward.png", "accepted_positions.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


BASE_SCORES = {
    "helpful": {"greedy": 0.5, "sampled": 0.0, "hot": -3.0},
    "cost": {"greedy": 1.0, "sampled": 0.25},
}


def test_the_plain_llm_is_worth_the_weighted_sum_where_all_heads_that_count_know_it() -> None:
    levels = llm_levels(BASE_SCORES, {"helpful": 1.0, "cost": -2.0})
    assert levels["episode/reward"] == {"greedy": -1.5, "sampled": -0.5}
    assert levels["episode/score/cost"]["greedy"] == 1.0
    unknown = {"helpful": BASE_SCORES["helpful"], "cost": {}}
    assert llm_levels(unknown, {"helpful": 1.0, "cost": -2.0})["episode/reward"] == {}
    watched = llm_levels(unknown, {"helpful": 2.0, "cost": 0.0})
    assert watched["episode/reward"] == {"greedy": 1.0, "sampled": 0.0}
    assert watched["episode/score/cost"] == {}


def test_the_reward_curve_shows_the_plain_llm_where_it_is_known_and_says_so_once() -> None:
    rows: list[dict[str, float | None]] = [
        {
            "episodes/total": 10.0 * n,
            "episode/reward": 1.0,
            "episode/score/cost": 1.0,
            "episode/score/helpful": 1.0,
        }
        for n in range(1, 4)
    ]
    known = llm_levels({"helpful": BASE_SCORES["helpful"], "cost": {}}, {"helpful": 1.0, "cost": 1.0})
    figure = reward_curve(rows, known)
    assert [horizontal_lines(panel) for panel in figure.axes] == [[], [], [0.5, 0.0]]
    labels = legend_of(figure)
    assert sum("the LLM alone, greedy: measured when" in label for label in labels) == 1
    assert sum("the LLM alone, sampled: measured when" in label for label in labels) == 1
    assert len(labels) == 4
    assert not any("LLM" in label for label in legend_of(reward_curve(rows, {})))


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def horizontal_lines(panel: Axes) -> list[float]:
    lines = [line for line in panel.lines if "LLM alone" in str(line.get_label())]
    return [float(np.asarray(line.get_ydata())[0]) for line in lines]


@pytest.mark.parametrize(("top_k", "places"), [(1, 1), (3, 3), (5, 5), (6, 6), (40, 6)])
def test_the_plot_of_positions_has_only_those_that_a_candidate_can_have(top_k: int, places: int) -> None:
    shares = {f"episode/accepted_rank_{rank}": 0.2 for rank in range(5)}
    panel = accepted_positions([{**shares, "episode/accepted_rank_rest": 0.0}], top_k).axes[0]
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels == ["1", "2", "3", "4", "5", "later"][:places]
    assert len(panel.patches) == 2 * places


def report_of(top_k: int, top_p: float, first: float, **others: Any) -> dict[str, Any]:
    truncation = {"top_k": top_k, "top_p": top_p, "temperature": 1.0}
    settings = {"decoding": {"truncation": truncation}, **others}
    return {"settings": settings, "accepted_ranks": [first, 1 - first, 0.0, 0.0, 0.0, 0.0]}


def write_reports(folder: Path, *reports: dict[str, Any]) -> list[Path]:
    paths = [folder / f"report-{number}.json" for number in range(len(reports))]
    for path, report in zip(paths, reports, strict=True):
        path.write_text(json.dumps(report))
    return paths


def test_the_plot_by_candidates_needs_two_pairs_of_k_and_p_under_else_equal_settings(tmp_path: Path) -> None:
    on_others = report_of(5, 0.8, 0.9, prompts="others")
    alike = [report_of(5, 0.95, 0.7), report_of(5, 0.95, 0.8)]
    assert draw_positions_by_candidates(tmp_path, write_reports(tmp_path, on_others, *alike)) is None
    paths = write_reports(tmp_path, report_of(5, 0.8, 0.9), *alike)
    for number, text in enumerate(("{", "[]", '{"note": 1}', '{"settings": {"decoding": null}}')):
        paths.insert(number, tmp_path / f"report-mine-{number}.json")
        paths[number].write_text(text)
    plot = draw_positions_by_candidates(tmp_path, paths)
    assert plot == tmp_path / CANDIDATES_PLOT and plot.read_bytes().startswith(b"\x89PNG")


def test_the_plot_by_candidates_has_a_panel_for_each_p_and_bars_for_each_k() -> None:
    shares = {(10, 0.9): [0.6, 0.4], (5, 0.9): [0.7, 0.3], (5, 0.8): [0.9, 0.1]}
    figure = positions_by_candidates({pair: [*few, 0, 0, 0, 0] for pair, few in shares.items()})
    assert [panel.get_title() for panel in figure.axes] == ["p 0.8", "p 0.9"]
    firsts = [[bars[0].get_height() for bars in panel.containers] for panel in figure.axes]
    assert firsts == [[0.9], [0.7, 0.6]]
    assert legend_of(figure) == ["k 5", "k 10"]
    # A k has the same colour and place everywhere.
    left, right = (panel.containers[0][0] for panel in figure.axes)
    assert (left.get_x(), left.get_facecolor()) == (right.get_x(), right.get_facecolor())


def test_a_run_without_episodes_has_no_plots(tmp_path: Path) -> None:
    write(tmp_path, [{"time_s": 1.0, "episodes/total": 0.0}])
    assert draw_plots(tmp_path, top_k=5) == []


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, [{"time_s": 1.0}], tail='{"time_s": 2.0, "sac')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"time_s": 1.0}]


@pytest.mark.parametrize("model", ["x/${oc.env:TOKEN}", r'"\x24{oc.env:TOKEN}"', r'"$\x7boc.env:TOKEN}"'])
def test_a_run_folder_of_somebody_else_reads_no_variable(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    text = dump_config(config).replace(f"model: {config.llm.model}", f"model: {model}")
    assert model in text
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml has \$\{…\} in a setting") as caught:
        load_run(tmp_path)
    assert "secret" not in str(caught.value)
