"""The report of a comparison against numbers computed by hand, and its pages as a reader meets them."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mara.actors.prompts import Prompt
from mara.common.errors import UserError
from mara.deploy.comparison.config import ComparisonConfig
from mara.deploy.comparison.page import html, markdown, print_summary, write_report
from mara.deploy.comparison.report import Report, make_report, repetition
from mara.deploy.comparison.results import Results, read_rows
from mara.deploy.config_file import make_settings

SCRIPT = "<script>alert('x')</script> & | *bold*"
SETTINGS = {
    "llm": {"model": "m"},
    "systems": {"base": {"kind": "llm"}, "mara": {"kind": "agent", "path": "a"}, "theirs": {"kind": "llm"}},
    "datasets": {"mine": {"path": "p.jsonl"}},
    "judges": {
        "helpful": {"path": "h", "weight": 2.0},
        "cost": {"path": "c", "weight": -0.5},
        "unused": {"path": "u", "weight": 0.0},
        "big": {"kind": "llm_judge", "url": "http://localhost:1/v1", "model": "big"},
    },
    "juries": {"thrifty": ["cost"]},
    "baseline": "base",
    "pairs": [["mara", "theirs"]],
    "num_samples": 2,
    "name": "mine",
}
PROMPTS = [
    Prompt("p1", "why?", "calm"),
    Prompt("p2", SCRIPT, "wild"),
    Prompt("p3", "what?", "calm"),
    Prompt("p4", "who?", "calm"),
]
TEXTS = {
    "base": ["same", "a b c d a b c d", "", "x"],
    "mara": ["same", f"ok\n{SCRIPT}", "much", "y"],
    "theirs": ["b", "c", "d", "e"],
}
SCORES = {
    "helpful": {"base": [1.0, 1.0, 1.0, 1.0], "mara": [1.001, 2.0, 2.0, 0.0], "theirs": [0.0] * 4},
    "cost": {"base": [0.0, 0.0, 0.0, 0.0], "mara": [-5.0, -1.0, 1.0, 1.0], "theirs": [0.0] * 4},
    "unused": {"base": [0.5] * 4, "mara": [1.5] * 4, "theirs": [0.0] * 4},
}
VERDICTS = {
    ("mara", "base"): [("tie", "tie"), ("A", "B"), ("A", "A"), ("unclear", "B")],
    ("theirs", "base"): [("B", "A")] * 4,
    ("mara", "theirs"): [("tie", "A")] * 4,
}


@pytest.fixture
def config(tmp_path: Path) -> ComparisonConfig:
    return make_settings(ComparisonConfig, json.loads(json.dumps(SETTINGS)), [], tmp_path)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    with Results(tmp_path) as results:
        results.keep_prompts("mine", PROMPTS)
        for system, texts in TEXTS.items():
            for place in (2, 0, 3, 1):  # as answers come
                prompt, text = PROMPTS[place], texts[place]
                row = {"id": prompt.id, "prompt": prompt.prompt, "response": text}
                known = {"tokens": 4 + place, "seconds": 2.0, "finish_reason": "eos" if place else "length"}
                unknown = dict.fromkeys(known)
                known["changed"] = place if system == "mara" else 0
                results.add_answer("mine", system, row | (unknown if system == "theirs" else known))
                for judge, scores in SCORES.items():
                    score = {"id": prompt.id, "score": scores[system][place]}
                    results.add_score("mine", system, judge, score)
                num_tokens = len(text.split())
                row = {"id": prompt.id, "num_tokens": num_tokens, "logprob": -0.5 * num_tokens - 0.25 * place}
                row["logprob_elsewhere"] = None if system == "theirs" else -2.0 * num_tokens
                results.add_score("mine", system, "likelihood", row)
        for (a, b), verdicts in VERDICTS.items():
            for prompt, both in zip(PROMPTS, verdicts, strict=True):
                difference = {("A", "B"): 1, ("B", "A"): -1}.get(both, 0)
                row = {"id": prompt.id, "against": b, "difference": difference, "verdicts": both}
                results.add_score("mine", a, "big", row)
        return results


@pytest.fixture
def report(config: ComparisonConfig, results: Results) -> Report:
    return make_report(config, results)


def counts(rate: dict) -> tuple[int, int, int]:
    return rate["wins"], rate["ties"], rate["losses"]


@pytest.mark.parametrize(
    ("own", "how"),
    [
        ({}, "by policy"),
        ({"threshold": 0.7}, "by policy, threshold 0.7"),
        (
            {"steering": "value", "min_advantage": 0.3, "gate": {"min_salience": 0.2}},
            "by value, bar 0.3, gate.min_salience 0.2",
        ),
    ],
)
def test_the_report_tells_how_agents_were_used(
    config: ComparisonConfig, results: Results, own: dict, how: str
) -> None:
    mara = config.systems["mara"]
    systems = config.systems | {"mara": type(mara).model_validate(mara.model_dump() | own)}
    report = make_report(config.model_copy(update={"systems": systems}), results)
    assert report["agents"] == {"mara": how}
    escaped = how.replace("_", r"\_")
    assert f"Equal answers tie. Agents: *mara* {escaped}.\n\n| data set" in markdown(report)
    assert f"Agents: <em>mara</em> {how}." in html(report)


def test_rates_are_wins_less_losses_by_each_judge_and_by_all(report: Report) -> None:
    assert [(pair["a"], pair["b"]) for pair in report["pairs"]] == [
        ("mara", "base"),
        ("theirs", "base"),
        ("mara", "theirs"),
    ]
    pair = report["pairs"][0]
    assert list(pair) == ["a", "b", "dataset", "num_prompts", "helpful", "cost", "big", "joint", "thrifty"]
    assert (pair["dataset"], pair["num_prompts"]) == ("mine", 4)
    # p1 is the same text, so its scores do not count; p2 better; p3 better, dearer; p4 worse, dearer.
    assert counts(pair["helpful"]) == (2, 1, 1)
    assert counts(pair["cost"]) == (1, 1, 2)
    assert counts(pair["joint"]) == (1, 2, 1)
    assert pair["thrifty"] == pair["cost"]
    assert report["juries"] == {"joint": ["helpful", "cost"], "thrifty": ["cost"]}
    assert counts(pair["big"]) == (1, 3, 0)
    assert pair["helpful"]["rate"] == pytest.approx(0.25)
    assert pair["cost"]["rate"] == pytest.approx(-0.25)
    assert pair["helpful"].keys() == {"rate", "low", "high", "wins", "ties", "losses"}
    assert pair["helpful"]["low"] <= 0.25 <= pair["helpful"]["high"]
    assert counts(report["pairs"][1]["big"]) == (0, 0, 4)
    assert counts(report["pairs"][2]["helpful"]) == (3, 1, 0)


def test_categories_are_compared_by_themselves(report: Report) -> None:
    found = {(row["category"], row["a"]): row for row in report["categories"] if row["b"] == "base"}
    assert found["calm", "mara"]["num_prompts"] == 3
    assert counts(found["calm", "mara"]["helpful"]) == (1, 1, 1)
    assert counts(found["wild", "mara"]["joint"]) == (1, 0, 0)
    assert len(report["categories"]) == 2 * 3


def test_what_the_order_did_to_verdicts_is_counted(report: Report) -> None:
    of_mara = next(row for row in report["verdicts"] if (row["a"], row["b"]) == ("mara", "base"))
    assert (of_mara["judge"], of_mara["num_disagreeing"], of_mara["num_unclear"]) == ("big", 1, 1)
    assert report["verdicts"][2]["num_disagreeing"] == 4


def test_what_a_judge_refused_is_left_out_of_its_rates_and_means(config, results) -> None:
    said = {"refused": "status 400: 'no'"}
    for place in (0, 1, 2):  # the first are equal answers
        results.add_score("mine", "mara", "helpful", {"id": PROMPTS[place].id, "score": None, **said})
    for prompt in PROMPTS:
        results.add_score("mine", "theirs", "cost", {"id": prompt.id, "score": None, **said})
        results.add_score("mine", "theirs", "big", {"id": prompt.id, "against": "base", **said})
    report = make_report(config, results)
    mara, theirs, _ = report["pairs"]
    assert counts(mara["helpful"]) == counts(mara["joint"]) == (0, 0, 1)
    assert counts(mara["cost"]) == (1, 1, 2)
    assert theirs.keys().isdisjoint({"cost", "big", "joint"}) and counts(theirs["helpful"])[2] == 4
    means = report["systems"]["mine"]
    assert means["mara"]["mean_scores"]["helpful"] == 0.0
    assert means["theirs"]["mean_scores"]["cost"] is None
    found = {(row["judge"], row["of"]): (row["num"], row["said"]) for row in report["refused"]}
    assert found == {
        ("helpful", "mara"): (3, said["refused"]),
        ("cost", "theirs"): (4, said["refused"]),
        ("big", "theirs against base"): (4, said["refused"]),
    }
    text = markdown(report)
    assert (
        "| mine | mara | helpful | 3 | status 400: 'no' |" in text
        and "theirs, helpful +0.000, cost –" in text
    )
    assert Page(html(report)).text.count("status 400: 'no'") == 3


def test_each_system_has_its_figures(report: Report) -> None:
    base, theirs = report["systems"]["mine"]["base"], report["systems"]["mine"]["theirs"]
    # Words: same | a b c d a b c d | (none) | x.
    num_tokens, logprob = 1 + 8 + 0 + 1, -0.5 * 10 - 0.25 * (0 + 1 + 2 + 3)
    assert base["perplexity"] == pytest.approx(math.exp(-logprob / num_tokens))
    assert base["relevance"] == pytest.approx((logprob + 2.0 * num_tokens) / num_tokens)
    assert theirs["relevance"] is None
    assert base["distinct_1"] == pytest.approx(6 / 10)
    assert base["distinct_2"] == pytest.approx(4 / 7)
    assert base["distinct_3"] == pytest.approx(4 / 6)
    assert base["repetition"] == pytest.approx(1 / 5)
    assert base["mean_tokens"] == pytest.approx(10 / 4)
    assert base["num_empty"] == 1
    assert base["eos_share"] == pytest.approx(3 / 4)
    assert base["tokens_per_s"] == pytest.approx((4 + 5 + 6 + 7) / 8)
    assert base["mean_scores"] == {"helpful": 1.0, "cost": 0.0, "unused": 0.5}
    assert (theirs["eos_share"], theirs["tokens_per_s"]) == (None, None)
    assert base["interventions"] is None is theirs["interventions"]
    assert report["systems"]["mine"]["mara"]["interventions"] == pytest.approx(6 / (4 + 5 + 6 + 7))
    assert "| 27.3% |" in markdown(report)


def test_answers_of_a_version_that_counted_no_changes_have_no_share_of_them(
    config: ComparisonConfig, results: Results
) -> None:
    path = results.folder / "answers" / "mine" / "mara.jsonl"
    path.write_text(path.read_text().replace('"changed"', '"other"', 1))
    assert make_report(config, results)["systems"]["mine"]["mara"]["interventions"] is None


def test_a_repetition_is_four_words_that_an_answer_had_before() -> None:
    assert repetition([["a", "b"], []]) == 0.0
    assert repetition([list("abcd"), list("aaaaaa")]) == pytest.approx((0 + 2 / 3) / 2)
    assert repetition([list("abcd"), list("abcd")]) == 0.0  # two answers


def test_samples_are_evenly_spread_with_every_answer_and_score(report: Report) -> None:
    first, last = report["samples"]["mine"]
    assert (first["id"], last["id"], last["category"]) == ("p1", "p4", "calm")
    assert last["answers"] == {"base": "x", "mara": "y", "theirs": "e"}
    assert last["scores"]["mara"] == {"helpful": 0.0, "cost": 1.0, "unused": 1.5}


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps what a reader sees and what a browser would fetch."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [name for name, _ in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def test_the_page_stands_alone_and_shows_markup_in_answers_as_text(config, results) -> None:
    config = config.model_copy(update={"num_samples": 4})
    text = html(make_report(config, results))
    page = Page(text)
    assert "script" not in page.tags and page.fetched == [] and "url(" not in text and "@import" not in text
    assert SCRIPT in page.text and "<script" not in text
    assert f"ok\n{SCRIPT}" in page.cells
    row = page.cells.index("helpful", page.cells.index("mara"))
    assert page.cells[row : row + 2] == ["helpful", "+25.0%"]
    assert page.cells[row + 2 : row + 6] == ["too few prompts", "2", "1", "1"]
    assert page.text.count("why?") == 1


def test_markdown_has_whole_tables_and_takes_nothing_in_answers_for_markup(config, results) -> None:
    config = config.model_copy(update={"num_samples": 4})
    text = markdown(make_report(config, results))
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(("|--", "|:--")):
            width = lines[number - 1].count("|")
            rows = [*lines[number - 1 : number + 1]]
            for row in lines[number + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append(row)
            assert len(rows) > 2 and {row.replace("\\|", "").count("|") for row in rows} == {width}
            assert lines[number - 2] == ""
    assert "| mine | mara | base | helpful | +25.0% | too few prompts | 2 | 1 | 1 |" in lines
    assert "| mine | calm | 3 | mara | base | joint |" in text
    assert "*joint*: better by helpful and by cost is a win, worse by each of them a loss." in text
    assert "*thrifty*: better by cost is a win, worse a loss." in text
    assert [line for line in lines if "<script>" in line] == [f"    {SCRIPT}"] * 2
    assert "    (empty)" in lines
    assert "Settings" not in markdown(make_report(config, results), is_summary=True)


def test_names_cannot_break_a_table(config, results) -> None:
    report = make_report(config, results)
    report["categories"][0]["category"] = "a | b\n<i>"
    assert r"| mine | a \| b \<i\> | 3 |" in markdown(report)


def test_all_three_files_are_written_and_the_tables_are_shown(report: Report, tmp_path: Path, capsys) -> None:
    paths = write_report(report, tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(report))
    print_summary(report)
    shown = capsys.readouterr().out
    assert "helpful" in shown and "+25.0%" in shown and "By category" not in shown
    for heading in ("perplexity", "relevance", "distinct-2", "changed"):  # whole words in one line
        assert heading in shown
    assert "distinct-1" not in shown and "distinct-1" in paths[1].read_text()


def test_prompts_without_categories_have_no_table_of_them(config, results) -> None:
    results.keep_prompts("mine", [Prompt(prompt.id, prompt.prompt) for prompt in PROMPTS])
    report = make_report(config, results)
    assert report["categories"] == []
    assert "By category" not in markdown(report) + html(report)


def test_without_judges_there_is_still_a_report(config, results) -> None:
    report = make_report(config.model_copy(update={"judges": {}, "juries": {}}), results)
    assert report["pairs"][0] == {"a": "mara", "b": "base", "dataset": "mine", "num_prompts": 4}
    assert "perplexity" in markdown(report) and Page(html(report)).tags


def test_a_line_that_a_killed_process_left_unfinished_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "answers" / "mine" / "base.jsonl"
    with Results(tmp_path) as results:
        results.add_answer("mine", "base", {"id": "a", "response": "é"})
        results.add_answer("mine", "base", {"id": "b", "response": ""})
    path.write_bytes(path.read_bytes()[:-3])
    assert read_rows(path) == [{"id": "a", "response": "é"}]
    with Results(tmp_path) as results:
        results.add_answer("mine", "base", {"id": "c", "response": ""})
    assert [row["id"] for row in read_rows(path)] == ["a", "c"]


def test_a_line_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "a"}\n{"id"\n{"id": "b"}\n')
    with pytest.raises(UserError, match=rf"^{path}, line 2: damaged \(.*\); delete the line"):
        read_rows(path)
