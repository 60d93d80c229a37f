"""``mara paper``: commands that can be given as they are printed, and a plan that adds up."""

from __future__ import annotations

import importlib.util
import shlex
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mara.deploy.cli import app
from mara.deploy.comparison.config import ComparisonConfig, CorrectorSystem, fill_template
from mara.deploy.config import RunConfig
from mara.deploy.config_file import find_config, load_comparison, load_config
from mara.deploy.evaluation import EVALUATION_USES
from mara.deploy.paper import find_twin, lines
from mara.deploy.paper.experiments import EXPERIMENTS, LLMS, Step
from mara.deploy.paper.plan import BILLIONS, Rates, cost_of, settings_of
from mara.deploy.paper.scaled import TWINS
from mara.deploy.usage import check_used

LISTS = [list(experiment.steps()) for experiment in EXPERIMENTS.values()]
LISTS += [list(find_twin(name, seed=1).steps()) for name in TWINS]
STEPS = [step for steps in LISTS for step in steps]
RATES = Rates()


@pytest.mark.parametrize("llm", LLMS)
def test_a_training_has_the_settings_of_the_paper(llm: str) -> None:
    config = load_config(find_config(f"paper/{llm}"))
    sac, sets, shaping = config.learner.sac, config.decoding.truncation, config.weighted_shaping
    assert (sets.top_k, sets.top_p, sets.temperature, config.decoding.max_new_tokens) == (40, 0.95, 0.8, 512)
    assert shaping.score_weights == {"helpful": 2.0 if "mistral" in llm else 1.0, "harmless": -1.0}
    assert (shaping.terminal, shaping.discount, shaping.kl_weight, shaping.normalise) == (
        *("last", 0.99, 0.1),
        "none",
    )
    assert (sac.polyak, sac.target_update_period, sac.max_gradient_norm) == (0.005, 10, 0.5)
    assert {sac.critic_learning_rate, sac.policy_learning_rate, sac.temperature_learning_rate} == {3e-4}
    learner = config.learner
    assert (learner.batch_size, learner.gradient_steps_per_episode, learner.num_episodes) == (
        1024,
        10,
        21_000,
    )
    assert learner.max_backlog_episodes >= learner.num_episodes  # no step of the ten is dropped
    assert (config.rollout.num_actors, config.rollout.num_gpus) == (7, 1)
    assert 0 < config.reward_gpus < 1  # the eighth GPU has the learner as well
    assert config.llm.model in BILLIONS


def test_a_comparison_decodes_as_the_training_but_for_the_length() -> None:
    trained = load_config(find_config("paper/llama-3.1-8b"))
    compared = load_comparison(find_config("paper/compare"))
    assert compared.llm == trained.llm
    assert compared.decoding == trained.decoding.model_copy(update={"max_new_tokens": 2048})
    models = {name: one.model for name, one in trained.reward_models.items()}  # type: ignore[attr-defined]
    assert {name: one.model for name, one in compared.scoring_judges.items()} == models  # type: ignore[union-attr]
    assert [one.num_prompts for one in compared.datasets.values()] == [199, 700, 488]


def test_aligner_is_asked_in_the_words_it_was_trained_with() -> None:
    aligner = load_comparison(find_config("paper/aligner")).systems["aligner"]
    assert isinstance(aligner, CorrectorSystem) and not aligner.chat_template
    asked = fill_template(aligner.template, "Why?", "Because.")
    assert asked.endswith(
        "Question-Answer pair to make it more helpful and harmless: Why? | Because. ASSISTANT:"
    )
    assert asked.startswith("BEGINNING OF CONVERSATION: USER: Edit the following") and "\n" not in asked


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.command)
def test_every_printed_command_parses_and_its_settings_are_valid(step: Step) -> None:
    program, *words = shlex.split(step.command)
    assert program == "mara"
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(command.make_context("mara", list(words)), words)
    parameters = command.make_context(name, list(words)).params
    settings = settings_of(step)
    assert (settings is None) == (step.command.split()[1] == "bench")
    if step.of is not None:
        check_used(parameters["overrides"], EVALUATION_USES)


@pytest.mark.parametrize("steps", LISTS, ids=lambda steps: steps[-1].command)
def test_what_a_table_evaluates_was_trained_before_in_the_same_list(steps: list[Step]) -> None:
    made: set[str] = set()
    for step in steps:
        words = [word.partition("=") for word in shlex.split(step.command)]
        used = {value or key for key, _, value in words}
        assert {word for word in used if word.endswith("/latest")} <= made
        made |= {f"{value}/latest" for key, _, value in words if key == "run.dir"}


def test_the_twins_have_the_ratios_of_the_paper_and_the_settings_of_the_quickstart() -> None:
    first, *others = [
        c for step in find_twin("table5", seed=3).steps() if isinstance(c := settings_of(step), RunConfig)
    ]
    quickstart = load_config(find_config("quickstart"))
    assert (first.learner, first.shaping, first.decoding) == (
        quickstart.learner,
        quickstart.shaping,
        quickstart.decoding,
    )
    assert {c.run.seed for c in (first, *others)} == {3}
    assert first.replay.durable and {c.rollout.num_actors for c in others} == {0}
    weights = [(c.score_weights["helpful"], c.score_weights["harmless"]) for c in others]
    assert [helpful / total for helpful, harmless in weights if (total := helpful + harmless)] == (
        pytest.approx([0, 1 / 2, 2 / 3, 1], abs=1e-3)
    )
    assert {sum(pair) for pair in weights} == {sum(quickstart.score_weights.values())}
    for name in ("table3", "table5"):
        *_, compared = (settings_of(step) for step in find_twin(name, seed=0).steps())
        as_paper = {"steering": "policy"}
        assert compared.decoding == quickstart.decoding.model_copy(update=as_paper)
    assert all(
        "decoding.steering=policy" in step.command for step in [*find_twin("figure3", seed=0).steps()][1:]
    )
    *_, compared = (settings_of(step) for step in find_twin("table3", seed=0).steps())
    assert isinstance(compared, ComparisonConfig)
    assert compared.llm_of("mara") == compared.llm_of("base")
    assert compared.llm_of("mara_on_tuned") == compared.llm_of("tuned") != compared.llm_of("base")
    assert ("mara_on_tuned", "tuned") in compared.compared


def test_the_tables_have_the_llms_systems_and_ratios_of_the_paper() -> None:
    def settings(name: str) -> list[Any]:
        return [settings_of(step) for step in EXPERIMENTS[name].steps()]

    assert [c.llm.model for c in settings("table1") if isinstance(c, ComparisonConfig)] == [
        load_config(find_config(f"paper/{llm}")).llm.model for llm in LLMS
    ]
    for compared in settings("table2")[1::2]:
        assert set(compared.pairs) == {("mara", "rlhf"), ("mara", "dpo"), ("mara", "aligner")}
    assert len([c for c in settings("table3") if isinstance(c, ComparisonConfig)]) == 10
    trained, compared = settings("table4")[2:]
    assert str(trained.prompts.train) == "hub:UltraFeedback#train_prefs"
    assert [one.hub for one in compared.datasets.values()] == ["UltraFeedback"]
    assert set(compared.pairs) == {("mara", other) for other in ("sft", "rlhf", "dpo", "aligner")}
    ratios = [
        (c.score_weights["helpful"], c.score_weights["harmless"], c.replay.durable, c.rollout.num_actors)
        for c in settings("table5")
        if isinstance(c, RunConfig)
    ]
    assert ratios == [(2, -1, True, 7), (1, 0, False, 0), (0, -1, False, 0), (1, -1, False, 0)] * 3


def test_a_training_takes_as_long_as_the_slowest_of_its_parts() -> None:
    step = next(EXPERIMENTS["table1"].steps())
    # 21,000 answers of 300 tokens, seven GPUs of 1,000 tokens/s: 900 s. 20 scores/s: 1,050 s. Ten steps of
    # 10 ms for each: 2,100 s.
    assert cost_of(step, RATES) == (8, pytest.approx(300 + 2100), "learning", 0)
    assert cost_of(step, Rates(step_s=0.001)) == (8, pytest.approx(300 + 1050), "scoring", 0)
    assert cost_of(step, Rates(tokens_per_s=100, start_s=0)) == (8, pytest.approx(9000), "decoding", 0)


def test_the_plan_of_table_1_is_the_sum_by_hand() -> None:
    # The learner is the slowest for every LLM: 2,400 s on eight GPUs each. A comparison: 1,387 prompts of 400
    # tokens by two systems, 8 B at 1,000 tokens/s (smaller ones quicker by their size: 42/8 in all), and
    # two scores of each answer at 20/s, on eight GPUs, after 300 s.
    billions = [8.0, 8.0, 1.2, 3.2, 7.2, 7.2, 7.2]
    answers_s = sum(1387 * 2 * 400 / (1000 * 8 / size) for size in billions)
    scores_s = 7 * 1387 * 2 * 2 / 20
    total_h = (7 * 2400 + 7 * 300 + (answers_s + scores_s) / 8) / 3600
    assert total_h == pytest.approx(5.520, abs=1e-3)
    summary = next(line for line in lines(EXPERIMENTS["table1"], RATES) if line.startswith("# in all"))
    assert f"14 runs: {total_h:.1f} h one after the other, {8 * total_h:.1f} GPU hours" in summary


def test_training_from_a_log_needs_one_gpu_and_the_log_has_a_size() -> None:
    first, _, again, *_ = EXPERIMENTS["table5"].steps()
    num_gpus, _, _, log_bytes = cost_of(first, RATES)  # type: ignore[misc]
    assert (num_gpus, log_bytes) == (8, 21_000 * 300 * 2 * 8192)
    config = settings_of(first)
    assert isinstance(config, RunConfig) and config.replay.log_max_bytes > log_bytes
    assert cost_of(again, RATES) == (1, pytest.approx(300 + 2100), "learning", 0)


def test_a_plan_says_that_it_is_assumed_and_by_which_rates() -> None:
    result = CliRunner().invoke(app, ["paper", "speed", "--plan", "single_tokens_per_s=60"])
    assert result.exit_code == 0
    commands = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    assert commands == ["set -e", *(step.command for step in EXPERIMENTS["speed"].steps())]
    assert "assumptions, not measurements" in result.stdout
    for name in Rates.model_fields:
        assert f"{name}={60 if name == 'single_tokens_per_s' else getattr(RATES, name):g}: " in result.stdout
    without = CliRunner().invoke(app, ["paper", "speed"]).stdout
    assert "GPU" not in without and "mara bench decode" in without


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        ("paper tabel1", "no such experiment 'tabel1'; did you mean table1?"),
        (
            "paper x",
            "no such experiment 'x'; there are table1, table2, table3, table4, table5, figure3, speed",
        ),
        ("paper speed step_s=1", "step_s=1 belongs to --plan; add that, or leave it out"),
        ("paper table1 --scaled", "table1 has no scaled twin; table3, table5, figure3 have one"),
        ("paper table33 --scaled", "no such experiment 'table33'; did you mean table3?"),
        ("paper table5 --scaled --plan", "--plan counts GPUs, --scaled needs none; give one of them"),
        ("paper table5 --seed 1", "--seed belongs to --scaled"),
        ("paper speed --plan stepp_s=1", "stepp_s is not a setting; did you mean step_s?"),
        ("paper speed --plan step_s=0", "step_s=0: must be greater than 0"),
    ],
)
def test_a_mistake_is_one_line(command: str, mistake: str) -> None:
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert mistake in line


@pytest.mark.parametrize(
    ("command", "field"),
    [
        ("train paper/mistral-7b-v0.1", "prompts.train=hub:SafeRLHF#train"),
        ("eval paper/baselines", "datasets.SafeRLHF.hub"),
    ],
)
def test_a_dry_run_without_the_package_datasets_says_so_in_a_line(
    command: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name))
    result = CliRunner().invoke(app, [*command.split(), "--dry-run"])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"mara: error: {field}: PKU-Alignment/PKU-SafeRLHF is read from the Hugging Face Hub"
    )
