"""``mara eval`` and ``mara generate`` on the folder of a run, with a tiny LLM and without Ray."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from mara.actors.calibration import ADVANTAGES, GATES, GateOutcome, choose_gate, try_ways
from mara.actors.config import DecodingConfig
from mara.actors.evaluation import Sample, preference_rate
from mara.actors.head_config import HeadShape
from mara.actors.heads import RewardHead, save_head
from mara.actors.reward_models.config import FunctionRewardConfig
from mara.common.agent import CARD_FILE, CRITIC_FILE, WEIGHTS_FILE, Agent, save_agent
from mara.common.config import AgentConfig
from mara.common.critic import TwinCritic, has_critic, save_critic
from mara.common.errors import UserError
from mara.deploy import calibration, evaluation
from mara.deploy.calibration import GATES_FILE, findings
from mara.deploy.cli import app
from mara.deploy.config import RunConfig
from mara.deploy.config_file import dump_config
from mara.deploy.evaluation import AnswerProgress, generate, of_each_outcome, run_evaluation
from mara.deploy.exchange import export_agent
from mara.deploy.plots import CANDIDATES_PLOT
from mara.deploy.run_folder import REPORT_FILE, load_run, load_use
from mara.learner.saving import AGENT_FOLDER


def test_an_evaluation_prints_and_saves_what_it_returns(tiny_run, capsys):
    folder, config = tiny_run
    figures = run_evaluation(folder, config)
    content = json.loads((folder / REPORT_FILE).read_text())
    (pair,) = content["pairs"]
    assert (pair["dataset"], pair["num_prompts"], content["num_prompts"]) == ("held_out", 3, 3)
    for name in ("helpful", "cost", "joint"):
        rate = pair[name]
        assert rate["wins"] + rate["ties"] + rate["losses"] == 3
        assert figures[f"eval/preference/{name}"] == rate["rate"]
    # The agent changes answers, so the rates are not empty.
    assert pair["helpful"]["ties"] < 3 and pair["cost"]["ties"] < 3
    assert content["mean_scores"].keys() == {"base", "agent", "base_sampled"}
    assert content["mean_scores"]["agent"].keys() == {"helpful", "cost"}
    ratio = content["fluency"]["agent"]["perplexity"] / content["fluency"]["base_sampled"]["perplexity"]
    assert figures["eval/perplexity_ratio"] == pytest.approx(ratio)
    assert sum(content["accepted_ranks"]) == pytest.approx(1.0)
    assert [sample["prompt"] for sample in content["samples"]] == ["why", "how so", "what"]
    shown = capsys.readouterr().out
    assert shown.count("prompt: ") == 1
    assert f"{pair['cost']['rate']:+.1%}" in shown
    assert shown.index("9 answers to make") < shown.index("9/9 answers")


def test_generating_shows_both_answers_and_they_are_those_of_the_evaluation(tiny_run, capsys):
    folder, config = tiny_run
    run_evaluation(folder, config)
    sample, *_ = json.loads((folder / REPORT_FILE).read_text())["samples"]
    capsys.readouterr()
    generate(folder, config, "why")
    shown, said = capsys.readouterr()
    assert "worse" not in said and "better" not in said
    assert "loading the LLM" in said and "loading" not in shown
    assert "answers are cut at 4 tokens; add decoding.max_new_tokens=NUMBER" in said
    assert f"base LLM, greedy:\n{sample['answers']['base'].strip()}\n" in shown
    assert f"with the agent, greedy:\n{sample['answers']['agent'].strip()}\n" in shown
    assert sample["answers"]["base"] != sample["answers"]["agent"]


@pytest.mark.parametrize(
    ("rates", "num_prompts", "is_warned"),
    [
        ({"helpful": (0.5, 0.9), "joint": (-0.6, -0.4)}, 20, True),
        ({"helpful": (0.5, 0.9), "joint": (-0.6, -0.4)}, 19, False),
        ({"helpful": (-0.5, -0.3), "joint": (-0.1, 0.2)}, 20, False),
        ({"helpful": (-0.5, -0.3)}, 20, True),
        ({}, 20, False),
    ],
)
def test_an_agent_that_its_own_report_calls_worse_is_told_of(
    tiny_run, capsys, rates: dict[str, tuple[float, float]], num_prompts: int, is_warned: bool
):
    folder, config = tiny_run
    counts = {"low": -0.9, "wins": 0, "ties": 0, "losses": num_prompts}
    pair = {name: {"rate": rate, "high": high, **counts} for name, (rate, high) in rates.items()}
    (folder / REPORT_FILE).write_text(json.dumps({"pairs": [{"a": "agent", **pair}]}))
    generate(folder, config, "why")
    export_agent(folder, config, folder / "exported")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "are better than those" in line]
    assert len(warnings) == (2 if is_warned else 0)
    assert all(f"{rates.get('joint', rates.get('helpful'))[0]:+.1%}" in line for line in warnings)


def test_the_report_says_with_which_settings_it_was_made(tiny_run):
    folder, config = tiny_run
    run_evaluation(folder, config)
    settings = json.loads((folder / REPORT_FILE).read_text())["settings"]
    assert settings["llm"] == {**settings["llm"], "model": config.llm.model, "dtype": "float32"}
    assert settings["rewards"]["cost"] == {
        "kind": "head",
        "path": str(config.rewards["cost"].path),
        "weight": -0.5,
    }
    assert settings["decoding"]["truncation"]["top_k"] == 4
    assert settings["evaluation"] == {"num_prompts": 3, "rows": 2, "num_samples": 1}
    assert settings["prompts"] == {"evaluation": str(config.prompts.evaluation)}
    assert settings["run"] == {"seed": 0} and settings["rollout"] == {"max_prompt_tokens": 30}
    assert settings.keys() == {"llm", "rewards", "decoding", "evaluation", "prompts", "run", "rollout"}


def test_a_second_evaluation_keeps_the_report_of_the_first(tiny_run, capsys):
    folder, config = tiny_run
    run_evaluation(folder, config)
    first = (folder / REPORT_FILE).read_text()
    fewer = config.evaluation.model_copy(update={"num_prompts": 1})
    run_evaluation(folder, config.model_copy(update={"evaluation": fewer}))
    (kept,) = folder.glob("report-*.json")
    assert kept.read_text() == first
    assert json.loads((folder / REPORT_FILE).read_text())["pairs"][0]["num_prompts"] == 1
    assert kept.name in capsys.readouterr().out


def test_evaluations_under_two_candidate_sets_are_drawn_in_one_plot(tiny_run, capsys):
    folder, config = tiny_run
    run_evaluation(folder, config)
    assert not (folder / CANDIDATES_PLOT).exists()
    fewer = config.decoding.truncation.model_copy(update={"top_k": 2})
    decoding = config.decoding.model_copy(update={"truncation": fewer})
    run_evaluation(folder, config.model_copy(update={"decoding": decoding}))
    assert (folder / CANDIDATES_PLOT).read_bytes().startswith(b"\x89PNG")
    assert str(folder / CANDIDATES_PLOT) in capsys.readouterr().out


@pytest.mark.parametrize("command", [["eval"], ["generate", "why"]])
def test_an_override_that_would_change_nothing_is_refused_without_its_value(tiny_run, command):
    folder, config = tiny_run
    (folder / "config.yaml").write_text(dump_config(config))
    name, *prompt = command
    unused = ["learner.num_episodes=5", "replay.redis_url=redis://:s3cret@h", "decoding.threshold=0.4"]
    result = CliRunner().invoke(app, [name, str(folder), *prompt, *unused])
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert [line.split()[2] for line in lines] == ["learner.num_episodes", "replay.redis_url"]
    assert all("changes nothing here" in line and "decoding" in line for line in lines)
    assert "s3cret" not in result.output


def test_an_agent_of_another_llm_of_the_same_size_is_a_line_with_both(tiny_run, capsys):
    folder, config = tiny_run
    card = {"llm": {"model": "other/model"}}
    save_agent(Agent(32, AgentConfig(widths=(16, 8))), folder / AGENT_FOLDER, card)
    generate(folder, config, "why")
    shown, said = capsys.readouterr()
    (line,) = [line for line in said.splitlines() if "warning" in line]
    assert "warning" not in shown
    assert "the agent was trained for the LLM other/model" in line and config.llm.model in line


def test_heads_of_another_llm_are_told_of_unless_the_training_has_done_so(tiny_run, tmp_path, capsys):
    folder, config = tiny_run
    for name in ("helpful", "cost"):
        card = json.loads((tmp_path / name / "head.json").read_text())
        (tmp_path / name / "head.json").write_text(json.dumps({**card, "llm": "other/model"}))
    run_evaluation(folder, config)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line.split()[2] for line in warnings] == ["rewards.helpful.path", "rewards.cost.path"]
    run_evaluation(folder, config, after_training=True)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("training", "warned"),
    [
        ({"gradient_steps": 40, "policy_steps": 0}, True),
        ({"gradient_steps": 0, "policy_steps": 0}, True),
        ({"gradient_steps": 40, "policy_steps": 1}, False),
        ({"gradient_steps": 40}, False),  # A card from before the policy's steps were counted.
    ],
)
def test_an_agent_whose_policy_never_moved_is_told_of_in_a_line_with_the_remedy(
    tiny_run, capsys, training, warned
):
    folder, config = tiny_run
    save_agent(Agent(32, AgentConfig(widths=(16, 8))), folder / AGENT_FOLDER, {"training": training})
    for command in (lambda: generate(folder, config, "why"), lambda: run_evaluation(folder, config)):
        command()
        shown, said = capsys.readouterr()
        assert "warning" not in shown
        warnings = [line for line in said.splitlines() if "warning" in line]
        assert len(warnings) == warned
        assert not warned or ("untrained" in warnings[0] and "learner.sac.critic_only_steps" in warnings[0])


def changed_llm(config: RunConfig, **settings: str) -> RunConfig:
    return config.model_copy(update={"llm": config.llm.model_copy(update=settings)})


@pytest.fixture
def no_loading(monkeypatch):
    """Fail where the LLM is loaded."""

    def load_llm(config):
        raise AssertionError("the LLM is loaded")

    monkeypatch.setattr("mara.deploy.evaluation.load_llm", load_llm)


def test_what_does_not_fit_is_said_before_the_llm_is_loaded(tiny_run, tmp_path, no_loading):
    folder, config = tiny_run
    with pytest.raises(UserError, match=r"llm\.device=cuda:99 cannot be used here"):
        run_evaluation(folder, changed_llm(config, device="cuda:99"))
    with pytest.raises(UserError, match=r"PROMPT: character 4 .* is not Unicode"):
        generate(folder, config, "caf\udce9")
    head = RewardHead(HeadShape(hidden_size=32, width=8)).requires_grad_(False)
    head.preference_D[0] = float("nan")
    save_head(tmp_path / "cost", head, {})
    with pytest.raises(UserError, match=r"rewards\.cost\.path: .*preference_D is not finite"):
        run_evaluation(folder, config)
    save_head(tmp_path / "cost", RewardHead(HeadShape(hidden_size=64)), {})
    with pytest.raises(UserError, match=r"rewards\.cost\.path: .*hidden size 64, the LLM has 32"):
        run_evaluation(folder, config)
    too_long = config.decoding.model_copy(update={"max_new_tokens": 100_000})
    endless = config.model_copy(update={"decoding": too_long})
    for command in (lambda: run_evaluation(folder, endless), lambda: generate(folder, endless, "why")):
        with pytest.raises(UserError, match=r"decoding\.max_new_tokens=100000: .* can read 256 tokens"):
            command()
    save_agent(Agent(64, AgentConfig(widths=(16, 8))), folder / AGENT_FOLDER, {})
    for command in (lambda: run_evaluation(folder, config), lambda: generate(folder, config, "why")):
        with pytest.raises(UserError, match="agent: .* hidden size 64, the LLM has 32"):
            command()


def test_what_is_missing_is_said_before_the_llm_is_loaded(tiny_run, no_loading):
    folder, config = tiny_run
    with pytest.raises(UserError, match=r"agent\.safetensors is missing"):
        run_evaluation(folder / "other", config)
    with pytest.raises(UserError, match="PROMPT is empty"):
        generate(folder, config, " ")
    without = config.model_copy(update={"prompts": config.prompts.model_copy(update={"evaluation": None})})
    with pytest.raises(UserError, match=r"prompts\.evaluation is not set"):
        run_evaluation(folder, without)
    free = {name: head.model_copy(update={"weight": 0.0}) for name, head in config.rewards.items()}
    for rewards in (free, {}):
        with pytest.raises(UserError, match=r"^rewards is empty or has no weight but 0"):
            run_evaluation(folder, config.model_copy(update={"rewards": rewards}))


@pytest.mark.parametrize(
    ("has_critic", "most", "num_tried"), [(True, 1.0, len(ADVANTAGES)), (False, 0.9, len(GATES))]
)
def test_calibrating_names_the_best_settings_and_they_can_be_used(
    tiny_run, monkeypatch, has_critic, most, num_tried
):
    folder, config = tiny_run
    if not has_critic:
        (folder / AGENT_FOLDER / CRITIC_FILE).unlink()
    monkeypatch.setattr(
        "mara.deploy.calibration.try_ways",
        # A random agent loses.
        lambda *args, **kwargs: [replace(tried, gain=abs(tried.gain)) for tried in try_ways(*args, **kwargs)],
    )
    given = ["calibrate", str(folder), "--num-prompts", "8", "--max-interventions", str(most)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0 and "joint rate: answers better" in result.output, result.output
    assert "none is named: 1 prompts cannot tell the best gain" in result.output
    assert json.loads((folder / GATES_FILE).read_text())["chosen"] is None
    monkeypatch.setattr("mara.deploy.calibration.is_proved", lambda outcome: True)
    # The first has nothing to set, and one that steps in nowhere is not named.
    monkeypatch.setattr(
        "mara.deploy.calibration.choose_gate",
        lambda outcomes, most: next(outcome for outcome in outcomes[1:] if outcome.interventions),
    )
    result = CliRunner().invoke(app, given)
    content = json.loads((folder / GATES_FILE).read_text())
    dense, *others = content["tried"]
    assert content["prompts"] == config.prompts.train.name
    assert dense["interventions"] > 0 and len(others) == num_tried
    assert dense["settings"]["steering"] == "policy"
    assert {row["settings"]["steering"] for row in others} == {"value" if has_critic else "policy"}
    (line,) = [line for line in result.output.splitlines() if line.startswith("use it with: ")]
    settings = line.removeprefix("use it with: ").split()
    run_evaluation(folder, load_run(folder, settings))
    used = json.loads((folder / REPORT_FILE).read_text())["settings"]["decoding"]
    chosen = content["chosen"]
    assert chosen == next(row["settings"] for row in others if row["interventions"])
    assert (used["steering"], used["min_advantage"]) == (chosen["steering"], chosen["min_advantage"])
    assert used["gate"] == {
        name.removeprefix("gate."): value for name, value in chosen.items() if name.startswith("gate.")
    }
    result = CliRunner().invoke(app, [*given, "decoding.gate.min_confidence=0.5"])
    assert result.exit_code == 2 and "decoding.gate.min_confidence changes nothing here" in result.output


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["decoding.min_advantage=0.3"], "decoding.min_advantage changes nothing by policy"),
        (["decoding.num_compared=3"], "decoding.num_compared changes nothing by policy"),
        (
            ["decoding.steering=value", "decoding.threshold=0.4"],
            "decoding.threshold changes nothing by value",
        ),
    ],
)
def test_settings_of_the_other_way_to_steer_are_refused(tiny_run, given, says):
    run = str(tiny_run[0])
    for words in (
        ["eval", run],
        ["generate", run, "why"],
        ["train", "quickstart", "decoding.steering=policy", "--dry-run"],
        ["eval", "compare", "decoding.steering=policy", f"systems.mara.path={run}", "--dry-run"],
    ):
        changes = {word.partition("=")[0]: word for word in [*words, *given]}
        result = CliRunner().invoke(app, list(changes.values()))
        assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1, words


def test_settings_that_training_or_one_of_the_agents_uses_are_taken(tiny_run):
    by_value = ["decoding.steering=value", "decoding.min_advantage=0.1"]
    sampling = ["decoding.fallback=first", "decoding.mode=lazy", "decoding.window=2"]
    result = CliRunner().invoke(app, ["train", "quickstart", *by_value, *sampling, "--dry-run"])
    assert result.exit_code == 0, result.stderr
    run, config = tiny_run
    agents = [
        f"systems.{name}={{kind: agent, path: {run}, steering: {name}}}" for name in ("policy", "value")
    ]
    content = {
        "llm": {"model": config.llm.model},
        "decoding": {"max_new_tokens": 4},
        "systems": {"base": {"kind": "llm"}},
        "datasets": {"some": {"path": config.prompts.evaluation}},
        "baseline": "base",
    }
    path = run / "both.yaml"
    path.write_text(json.dumps(content, default=str))
    given = ["eval", str(path), "--dry-run", "decoding.threshold=0.6"]
    result = CliRunner().invoke(app, [*given, *agents, "decoding.min_advantage=0.2"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, [*given, agents[1]])
    assert result.exit_code == 2 and "decoding.threshold changes nothing by value" in result.stderr


def test_more_candidates_cannot_be_compared_than_there_are(tiny_run):
    given = ["decoding.truncation.top_k=5", "decoding.num_compared=6"]
    result = CliRunner().invoke(app, ["train", "quickstart", *given, "--dry-run"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    says = "decoding.num_compared=6 is more than the candidates that there are, decoding.truncation.top_k=5"
    assert says in result.stderr
    for fits in (["decoding.truncation.top_k=3"], ["decoding.truncation.top_k=6", given[1]]):
        result = CliRunner().invoke(app, ["train", "quickstart", *fits, "--dry-run"])
        assert result.exit_code == 0, result.stderr


def outcome(gain: float, interventions: float, bar: float | None = None) -> GateOutcome:
    steering = {"steering": "policy"} if bar is None else {"steering": "value", "min_advantage": bar}
    rate = preference_rate([np.array([1.0, 1.0, 0.0])])
    return GateOutcome(DecodingConfig(**steering), rate, gain, 0.1, interventions, perplexity=3.21)


@pytest.mark.parametrize(
    ("tried", "limit", "first", "more"),
    [
        ([outcome(0.4, 0.2), outcome(0.5, 0.09, 0.2), outcome(0.9, 0.3, 0.05)], 0.5, "use it with:", True),
        ([outcome(0.4, 0.2), outcome(0.5, 0.09, 0.2), outcome(0.9, 0.3, 0.05)], 2, "use it with:", False),
        (
            [outcome(0.4, 0.2), outcome(0.0, 0.0, 0.2), outcome(0.9, 0.3, 0.05)],
            0.5,
            "none that steps in at",
            True,
        ),
        ([outcome(0.4, 0.2), outcome(0.9, 0.3, 0.05)], 0.5, "none that steps in at all", True),
        (
            [outcome(0.2, 0.2), outcome(-0.1, 0.05, 0.2), outcome(0.9, 0.3, 0.6)],
            0.5,
            "none that steps in so",
            True,
        ),
        ([outcome(-0.4, 0.2), outcome(-0.1, 0.05, 0.2), outcome(0.0, 0.0, 0.9)], 0.5, "none gains", False),
        ([outcome(-0.4, 0.2), outcome(-0.1, 0.15, 0.2)], 0.5, "none gains anything", False),
        ([outcome(-0.4, 0.2), outcome(-0.3, 0.05, 0.2)], 0.5, "none gains anything", False),
        ([outcome(0.0, 0.0), outcome(0.9, 0.3, 0.05)], 0.5, "by policy it never steps in", False),
        ([outcome(0.05, 0.2), outcome(0.02, 0.1, 0.2)], 1, "none is named: 8 prompts cannot", False),
    ],
)
def test_a_calibration_says_what_to_use_and_what_its_limit_shuts_out(tried, limit, first, more):
    lines = list(findings(tried, choose_gate(tried, limit), limit, DecodingConfig(), 8))
    assert lines[0].startswith(first)
    beyond = [line for line in lines if line.startswith("more is gained beyond the limit, at 1.50 times")]
    assert len(beyond) == more == any("beyond" in line for line in lines)
    assert all(
        "by value, bar 0." in line and "joint rate +66.7%, gain +0.90 ± 0.10" in line for line in beyond
    )


def test_where_an_agent_never_steps_in_by_policy_no_limit_is_named():
    tried = [outcome(0.0, 0.0), outcome(0.9, 0.6, 0.03), outcome(0.5, 0.2, 0.2)]
    first, second, third, *others = findings(tried, choose_gate(tried, 0.0), 0.0, DecodingConfig(), 8)
    assert "--max-interventions shuts nothing out" in first and "min_advantage=0.03" in second
    assert "the limit" not in third and not any("limit" in line for line in others)


@pytest.mark.parametrize(("dense", "top"), [(0.2, 0.3008), (0.03, 0.33), (0.1, 0.3)])
def test_a_limit_taken_from_the_advice_lets_that_way_in(dense, top):
    tried = [outcome(0.4, dense), outcome(0.5, 0.4 * dense, 0.2), outcome(0.9, top, 0.05)]
    (line,) = [
        line
        for line in findings(tried, choose_gate(tried, 0.5), 0.5, DecodingConfig(), 8)
        if line.startswith("more is gained beyond the limit, at ")
    ]
    assert choose_gate(tried, float(re.search(r"at ([\d.]+) times", line)[1])) is tried[2]


def test_a_calibration_says_what_its_settings_cost_against_those_of_now():
    dense, less, now = outcome(0.4, 0.2), outcome(0.5, 0.09, 0.2), outcome(0.9, 0.3, 0.12)
    by_value = DecodingConfig(steering="value", min_advantage=0.12)
    lines = list(findings([dense, now, less], less, 0.5, by_value, 8))
    assert lines[0] == "use it with: decoding.min_advantage=0.2"
    assert "gain +0.50 ± 0.10, interventions 9.0%" in lines[1] and lines[1].startswith("with that:")
    assert "gain +0.90 ± 0.10, interventions 30.0%" in lines[2] and lines[2].startswith("as it is used now:")
    lines = list(findings([dense, now, less], now, 2.0, by_value, 8))
    assert lines[0] == "use it with: the settings that it has"
    assert not any(line.startswith(("with that", "as it is used")) for line in lines)


def test_calibrating_with_a_change_names_it_in_what_to_use(tiny_run, monkeypatch):
    monkeypatch.setattr("mara.deploy.calibration.is_proved", lambda outcome: True)
    monkeypatch.setattr("mara.deploy.calibration.choose_gate", lambda outcomes, most: outcomes[0])
    monkeypatch.setattr(
        "mara.deploy.calibration.try_ways",
        lambda *args, **kwargs: [replace(tried, gain=abs(tried.gain)) for tried in try_ways(*args, **kwargs)],
    )
    given = ["calibrate", str(tiny_run[0]), "--num-prompts", "8", "--max-interventions", "9"]
    changed = ["decoding.threshold=0.6", "decoding.truncation.top_k=3"]
    result = CliRunner().invoke(app, [*given, *changed])
    assert f"use it with: {' '.join(changed)}\n" in result.output, result.output
    assert "│ now" not in result.output
    for words in (
        ["export", str(tiny_run[0]), "--out", str(tiny_run[0] / "out")],
        ["eval", str(tiny_run[0])],
    ):
        result = CliRunner().invoke(app, [*words, *changed])
        assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, [*given, "decoding.num_compared=5", "decoding.truncation.top_k=4"])
    assert result.exit_code == 2 and "more than the candidates" in result.output


def test_calibrating_tries_and_marks_the_settings_of_now(tiny_run):
    folder, config = tiny_run
    used = config.decoding.model_copy(update={"steering": "value", "min_advantage": 0.07})
    (folder / "config.yaml").write_text(dump_config(config.model_copy(update={"decoding": used})))
    result = CliRunner().invoke(app, ["calibrate", str(folder), "--num-prompts", "8"])
    marked = re.search(r"│ now +│ by value, bar.*\n│ +│ 0\.07 ", result.output)  # The gain fills the row.
    assert marked is not None and result.output.count("│ now") == 1, result.output
    rows = json.loads((folder / GATES_FILE).read_text())["tried"]
    assert rows[1]["settings"]["min_advantage"] == 0.07 and len(rows) == 2 + len(ADVANTAGES)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["calibrate", "{run}", "--prompts", "none.txt"], "--prompts: "),
        (["eval", "nosuch"], "or a configuration, such as compare"),
        (["generate", "nosuch", "why"], "nosuch does not exist; give the folder of a run, which"),
        (["generate", "{runs}", "why"], "one that `mara train` made in it, such as {runs}/latest"),
        (["eval", "--resume", "nosuch"], "--resume=nosuch does not exist"),
    ],
)
def test_a_folder_that_is_not_what_is_needed_is_one_line(tiny_run, tmp_path, words, says):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(tiny_run[0])
    places = {"run": tiny_run[0], "runs": tmp_path / "runs"}
    result = CliRunner().invoke(app, [word.format(**places) for word in words])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.stderr
    assert says.format(**places) in result.stderr


@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_what_is_found_belongs_to_the_run_that_a_link_named_at_first(
    tiny_run, tmp_path, monkeypatch, command
):
    run, _ = tiny_run
    latest = tmp_path / "latest"
    latest.symlink_to(run.name)
    other = tmp_path / "other"
    other.mkdir()
    loaded = evaluation.load_parts

    def load(*args, **kwargs):
        latest.unlink()
        latest.symlink_to(other.name)
        return loaded(*args, **kwargs)

    for module in (evaluation, calibration):
        monkeypatch.setattr(module, "load_parts", load)
    result = CliRunner().invoke(app, [command, str(latest)])
    file = REPORT_FILE if command == "eval" else GATES_FILE
    assert result.exit_code == 0 and (run / file).is_file() and not any(other.iterdir()), result.output
    assert f"{run / file}" in result.output.replace("\n", "")


def test_a_signal_that_ends_a_calibration_says_what_is_left(tiny_run, monkeypatch):
    monkeypatch.setattr(
        calibration, "load_parts", lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM)
    )
    result = CliRunner().invoke(app, ["calibrate", str(tiny_run[0])])
    assert result.exit_code == 143
    assert result.stderr.splitlines()[-1] == "mara: error: interrupted; nothing was saved"


def test_an_exported_agent_that_is_calibrated_stays_as_it_is(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "agent"
    assert CliRunner().invoke(app, ["export", str(tiny_run[0]), "--out", str(out)]).exit_code == 0
    heads = [f"rewards.{name}.path={tmp_path / name}" for name in ("helpful", "cost")]
    prompts = ["--prompts", str(tmp_path / "held_out.jsonl"), "--num-prompts", "8"]
    result = CliRunner().invoke(app, ["calibrate", str(out), *prompts, *heads])
    assert result.exit_code == 0, result.output
    assert len(list(out.iterdir())) == 3
    assert [path.name for path in (tmp_path / "runs").glob("agent-*/*")] == [GATES_FILE]


def test_a_critic_of_somebody_else_is_none(tiny_run):
    folder, _ = tiny_run
    place = folder / AGENT_FOLDER
    card = json.loads((place / CARD_FILE).read_text())
    assert has_critic(place)
    seal = hashlib.sha256((place / WEIGHTS_FILE).read_bytes()).hexdigest()
    (place / CARD_FILE).write_text(json.dumps(card | {"weights_sha256": seal}))
    assert not has_critic(place)
    given = ["calibrate", str(folder), "--num-prompts", "8"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    settings = [row["settings"]["steering"] for row in json.loads((folder / GATES_FILE).read_text())["tried"]]
    assert set(settings) == {"policy"}


def test_calibrating_tells_what_the_limit_shuts_out_and_needs_no_critic(tiny_run):
    folder, config = tiny_run
    by_value = config.decoding.model_copy(update={"steering": "value"})
    (folder / "config.yaml").write_text(dump_config(config.model_copy(update={"decoding": by_value})))
    given = ["calibrate", str(folder), "--num-prompts", "8", "--max-interventions"]
    result = CliRunner().invoke(app, [*given, "0"])
    assert "none gains anything on these prompts" in result.output, result.output
    result = CliRunner().invoke(app, [*given, "inf"])
    assert result.exit_code == 2 and "--max-interventions=inf is no number of times" in result.output
    (folder / AGENT_FOLDER / CRITIC_FILE).unlink()
    result = CliRunner().invoke(app, [*given, "9"])
    assert result.exit_code == 0, result.output
    rows = json.loads((folder / GATES_FILE).read_text())["tried"]
    assert {row["settings"]["steering"] for row in rows} == {"policy"} and len(rows) == 1 + len(GATES)


def test_by_value_an_agent_without_its_critic_is_refused_in_one_line(tiny_run):
    folder, _ = tiny_run
    given = [str(folder), "decoding.steering=value", "decoding.min_advantage=0"]
    said = []
    for settings in (given[:1], given):
        result = CliRunner().invoke(app, ["eval", *settings])
        assert result.exit_code == 0, result.output
        said.append(json.loads((folder / REPORT_FILE).read_text())["samples"])
    assert [s["answers"]["base"] for s in said[0]] == [s["answers"]["base"] for s in said[1]]
    assert [s["answers"]["agent"] for s in said[0]] != [s["answers"]["agent"] for s in said[1]]
    critic = folder / AGENT_FOLDER / CRITIC_FILE
    save_critic(TwinCritic(64, (16, 8)), folder / AGENT_FOLDER)
    for damage, says in (
        (lambda: None, "was trained for hidden size 64, the LLM has 32"),
        (lambda: critic.write_bytes(critic.read_bytes()[:-9]), "cannot be read"),
        (critic.unlink, "needs the agent's critic"),
    ):
        damage()
        result = CliRunner().invoke(app, ["eval", *given])
        assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1


LATER = "def score(p, r):\n    if 'sky' in p[0]: return [0.0] * len(p)\n"
"""A function that answers when it is tried, before anything else is loaded."""
JUDGE = "def score(prompts, responses): return [len(p) + len(r) / 64 for p, r in zip(prompts, responses)]\n"


def test_rewards_that_are_no_heads_are_compared_by_as_well(tiny_run, tmp_path, monkeypatch, capsys):
    folder, config = tiny_run
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge_of_evaluation.py").write_text(JUDGE)
    reward = FunctionRewardConfig(function="judge_of_evaluation:score", weight=-2.0)
    config = config.model_copy(update={"rewards": {**config.rewards, "letters": reward}})
    figures = run_evaluation(folder, config)
    content = json.loads((folder / REPORT_FILE).read_text())
    assert {"helpful", "cost", "letters"} <= content["pairs"][0].keys()
    assert "eval/preference/letters" in figures
    sample, *_ = content["samples"]
    for system, answer in sample["answers"].items():
        assert sample["scores"][system]["letters"] == len(sample["prompt"]) + len(answer) / 64
    assert content["settings"]["rewards"]["letters"]["kind"] == "function"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (f"{LATER}    raise OSError('no\\nmore')", r"rewards\.letters: no scores \(OSError: no\)"),
        (
            f"{LATER}    return [float('nan')] * len(p)",
            r"rewards\.letters: the answer of 'base' .* finite",
        ),
    ],
)
def test_a_reward_that_fails_ends_the_evaluation_in_one_line(tiny_run, tmp_path, monkeypatch, code, says):
    folder, config = tiny_run
    monkeypatch.chdir(tmp_path)
    name = f"judge_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    reward = FunctionRewardConfig(function=f"{name}:score", weight=1.0)
    with pytest.raises(UserError, match=says) as caught:
        run_evaluation(folder, config.model_copy(update={"rewards": {"letters": reward}}))
    assert "\n" not in str(caught.value)
    assert not (folder / REPORT_FILE).exists()


def test_an_exported_agent_names_the_rewards_that_its_card_does_not_give(tiny_run, tmp_path, capsys):
    folder, config = tiny_run
    exported = folder / AGENT_FOLDER
    card = json.loads((exported / "agent.json").read_text())
    card["rewards"]["words"] = {"settings": {"kind": "function", "function": "os:system"}, "weight": 1.0}
    (exported / "agent.json").write_text(json.dumps(card))
    assert load_use(exported).rewards.keys() == {"helpful", "cost"}
    run_evaluation(folder, config)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "the agent was trained by words as well" in told and "rewards.NAME.kind" in told


def test_how_long_all_answers_take_is_not_guessed_from_the_first(monkeypatch, capsys):
    now = itertools.count(0, 15)
    clock = SimpleNamespace(monotonic=lambda: float(next(now)))
    monkeypatch.setattr("mara.deploy.evaluation.time", clock)
    progress = AnswerProgress()
    for done in (0, 1, 10, 20):
        progress.tell(done, 20 if done == 20 else 200)
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert "200 answers to make" in first
    assert "1/200" in second and "ETA" not in second
    assert "10/200" in third and "ETA" in third
    assert "20/20" in last and "ETA" not in last


def test_the_examples_shown_are_of_every_outcome_and_spread_over_the_prompts():
    outcomes = ["mixed"] * 40 + ["worse"] + ["same"] * 50 + ["better"] * 9
    samples = [Sample(str(n), "", "", outcome, {}, {}) for n, outcome in enumerate(outcomes)]
    shown = [sample.id for sample in of_each_outcome(samples, 6)]
    assert shown == ["10", "30", "40", "66", "93", "97"]
    assert [sample.id for sample in of_each_outcome(samples, 2)] == ["40", "95"]
    assert of_each_outcome(samples, 1000) == samples and of_each_outcome([], 3) == []
