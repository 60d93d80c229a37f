import json
from dataclasses import replace

import numpy as np
import pytest

from mara.actors.config import DecodingConfig, GateConfig, TruncationConfig
from mara.actors.evaluation import CategoryRates, EvaluationReport, Fluency, Sample, preference_rate
from mara.deploy.evaluation import headline, print_report, report_json
from mara.deploy.finished_run import FORCED_SHARE


def decoding(top_k: int, **settings: object) -> DecodingConfig:
    return DecodingConfig(truncation=TruncationConfig(top_k=top_k)).model_copy(update=settings)


def shown_places(top_k: int, capsys: pytest.CaptureFixture[str]) -> str:
    print_report(make_report(), decoding(top_k), num_samples=0)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "by its place" in line]
    return line.partition("place: ")[2].partition(";")[0]


def make_report() -> EvaluationReport:
    better, worse = np.array([1.0, 1.0, 1.0, -1.0]), np.array([-1.0, 1.0, -1.0, -1.0])
    systems = ("base", "agent", "base_sampled")
    return EvaluationReport(
        num_prompts=4,
        num_different=4,
        preference={
            "helpful": preference_rate([better]),
            "harmless": preference_rate([worse]),
            "joint": preference_rate([better, worse]),
        },
        fluency={
            name: Fluency(2.0 + number, 0.5, 0.8, 0.9, 38.5, 0.25) for number, name in enumerate(systems)
        },
        mean_scores={name: {"helpful": 0.1, "harmless": 0.2} for name in systems},
        accepted_ranks=[0.7, 0.1, 0.1, 0.05, 0.03, 0.02],
        decisions_per_token=1.4,
        forced_share=0.05,
        interventions=0.176,
        samples=[
            Sample(
                f"q{number}",
                f"Why [not] {number}?",
                "odd [red]" if number % 2 else "",
                "worse",
                {"base": "No.", "agent": "Because [bold]so[/bold]."},
                {name: {"helpful": 1.0, "harmless": -1.0} for name in ("base", "agent")},
            )
            for number in range(4)
        ],
        categories={
            "odd [red]": CategoryRates(
                2, {"helpful": preference_rate([better[1::2]]), "joint": preference_rate([worse[:2]])}
            )
        },
    )


def test_the_table_says_how_the_agent_was_used(capsys):
    print_report(make_report(), decoding(5), num_samples=0)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Agent (by policy)" in shown and "5% of the decided tokens were forced" in shown
    assert "17.6% of all tokens, with and without a choice, are not the LLM's first candidate" in shown
    by_value = replace(make_report(), forced_share=None)
    print_report(by_value, decoding(5, steering="value", min_advantage=0.2), num_samples=0)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Agent (by value, bar 0.2)" in shown and "1.40 candidates compared a token" in shown
    assert "forced" not in shown
    assert FORCED_SHARE in headline(make_report()) and FORCED_SHARE not in headline(by_value)


@pytest.mark.parametrize(
    ("asked", "settings", "remedy"),
    [
        (1.4, {}, "Train the agent longer (learner.num_episodes)"),
        (
            0.0,
            {"gate": GateConfig(max_first_probability=0.01)},
            "Loosen decoding.gate (gate.max_first_probability 0.01)",
        ),
        (0.0, {}, "Allow more candidates (decoding.truncation)"),
    ],
)
def test_answers_that_are_the_llms_own_are_told_with_what_may_change_that(capsys, asked, settings, remedy):
    nothing = replace(make_report(), interventions=0.0, decisions_per_token=asked)
    print_report(nothing, decoding(5, **settings), num_samples=0)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"the answers are the LLM's own. {remedy}" in shown
    assert ("by its place" in shown) == (asked > 0) != ("was asked nowhere" in shown)


def test_many_forced_tokens_are_told_with_the_remedy(capsys):
    for share, is_told in ((0.25, False), (0.26, True)):
        print_report(replace(make_report(), forced_share=share), decoding(5), num_samples=0)
        assert ("train it longer (learner.num_episodes)" in capsys.readouterr().out) == is_told


def test_the_report_for_programs_has_the_agreed_form():
    content = json.loads(json.dumps(report_json(make_report(), "prompts_eval")))
    (pair,) = content["pairs"]
    assert (pair["a"], pair["b"], pair["dataset"], pair["num_prompts"]) == (
        "agent",
        "base",
        "prompts_eval",
        4,
    )
    assert {name: pair[name]["rate"] for name in ("helpful", "harmless", "joint")} == {
        "helpful": 0.5,
        "harmless": -0.5,
        "joint": 0.0,
    }
    assert all(pair[name]["low"] <= pair[name]["rate"] <= pair[name]["high"] for name in ("helpful", "joint"))
    assert content["fluency"]["agent"]["perplexity"] == 3.0
    assert [(sample["id"], sample.get("category")) for sample in content["samples"]] == [
        ("q0", None),
        ("q1", "odd [red]"),
        ("q2", None),
        ("q3", "odd [red]"),
    ]
    assert content["samples"][3] == {
        "id": "q3",
        "prompt": "Why [not] 3?",
        "category": "odd [red]",
        "outcome": "worse",
        "answers": {"base": "No.", "agent": "Because [bold]so[/bold]."},
        "scores": {name: {"helpful": 1.0, "harmless": -1.0} for name in ("base", "agent")},
    }
    (category,) = content["categories"].values()
    assert (category["num_prompts"], category["helpful"]["rate"], category["joint"]["rate"]) == (2, 0.0, 0.0)


def test_the_headline_sets_the_agents_perplexity_against_the_sampled_llms():
    figures = headline(make_report())
    assert figures["eval/preference/helpful"] == 0.5
    assert figures["eval/perplexity_ratio"] == 3.0 / 4.0


def test_the_report_for_people_shows_rates_fluency_and_the_text_as_it_is(capsys):
    print_report(make_report(), decoding(40), num_samples=2)
    shown = capsys.readouterr().out
    assert "the agent's answer is worse by all rewards" in shown
    for expected in ("+50.0%", "-50.0%", "3.00", "1: 70%", "Because [bold]so[/bold].", "2 odd [red]"):
        assert expected in shown
    assert [line for line in shown.splitlines() if line.startswith("prompt: ")] == [
        "prompt: Why [not] 1?",
        "prompt: Why [not] 3?",
    ]


def test_a_category_of_all_prompts_is_not_shown_beside_them(capsys):
    report = make_report()
    print_report(
        replace(report, categories={"each": CategoryRates(4, report.preference)}), decoding(5), num_samples=0
    )
    assert "each" not in capsys.readouterr().out


def test_only_places_that_a_candidate_can_have_are_shown(capsys):
    assert shown_places(3, capsys) == "1: 70%, 2: 10%, 3: 10%"
    assert shown_places(5, capsys) == "1: 70%, 2: 10%, 3: 10%, 4: 5%, 5: 3%"
    assert shown_places(6, capsys) == "1: 70%, 2: 10%, 3: 10%, 4: 5%, 5: 3%, later: 2%"


def test_an_agent_that_changes_nothing_is_said_to(capsys):
    told = "the answers are the LLM's own"
    report = make_report()
    # First candidates alone, and nothing that was decided.
    for ranks, share, is_told in (
        ([1.0, 0, 0, 0, 0, 0], 0.0, True),
        ([0.0] * 6, 0.0, True),
        (None, 0.1, False),
    ):
        changed = replace(report, accepted_ranks=ranks or report.accepted_ranks, interventions=share)
        print_report(changed, decoding(5), num_samples=0)
        assert (told in capsys.readouterr().out) == is_told


def test_where_all_answers_tie_no_interval_is_claimed(capsys):
    report = replace(make_report(), preference={"joint": preference_rate([np.zeros(4)])})
    for num_different, told in ((0, "no answer differs"), (2, "all tie")):
        print_report(replace(report, num_different=num_different), decoding(5), num_samples=0)
        shown = capsys.readouterr().out
        assert told in shown and "to +0.0%" not in shown
