"""Reading run configurations: strictness, overrides, and what the messages say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from mara.common.addresses import hide_passwords
from mara.common.config import LONGEST_S
from mara.common.errors import UserError
from mara.deploy.config import SHIPPED_DIR, RunConfig, is_of_hub
from mara.deploy.config_file import (
    COMPARISON_KEY,
    CONFIGS_DIR,
    dump_config,
    find_config,
    load_config,
    read_content,
    shipped_configs,
)

MINIMAL = """
llm: {model: some/model}
prompts: {train: prompts.jsonl}
rewards:
  helpful: {path: heads/helpful, weight: 1.0}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


TRAININGS = {
    name: path for name, path in shipped_configs().items() if COMPARISON_KEY not in read_content(path)
}


@pytest.mark.parametrize("name", TRAININGS)
def test_every_shipped_configuration_parses_and_names_prompts_that_ship_or_are_of_the_hub(name: str) -> None:
    config = load_config(find_config(name))
    assert config.prompts.evaluation is not None
    for prompts in (config.prompts.train, config.prompts.evaluation):
        assert prompts.is_file() != is_of_hub(prompts)


def test_a_configuration_stands_on_the_shipped_one_that_it_includes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "include: quickstart\nrewards: {harmless: null, helpful: {weight: 2.0}}\n"
        "prompts: {evaluation: mine.txt}\nagent: {widths: [8, 4]}\n"
    )
    config, below = load_config(path, ["learner.num_episodes=7"]), load_config(find_config("quickstart"))
    assert config.score_weights == {"helpful": 2.0}
    assert config.rewards["helpful"].path == below.rewards["helpful"].path  # type: ignore[union-attr]
    assert config.prompts.train == below.prompts.train
    assert config.prompts.evaluation == tmp_path / "mine.txt"
    assert config.agent.widths == (8, 4)
    assert config.learner == below.learner.model_copy(update={"num_episodes": 7})
    assert config.run.name == "mine"
    without = load_config(find_config("quickstart"), ["rewards.helpful=null"])
    assert list(without.rewards) == ["harmless"]
    with pytest.raises(UserError, match=r"rewards\.helpful"):
        load_config(find_config("quickstart"), ["rewards.helpful="])


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("quikstart", "did you mean quickstart?"),
        ("../../pyproject", "there are baselines, compare"),
        ("3", "there are"),
    ],
)
def test_only_shipped_configurations_can_be_included(tmp_path: Path, name: str, remedy: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"include: {name}\n")
    message = error_of(path)
    assert f"include: {name!r} is not a shipped configuration; {remedy}" in message
    assert "\n" not in message


def test_the_printed_configuration_loads_to_the_same_settings(minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal, ["learner.sac.polyak=1e-3", "run.name=again", "agent.widths=[8,4]"])
    printed = tmp_path / "elsewhere" / "printed.yaml"
    printed.parent.mkdir()
    printed.write_text(dump_config(config))
    assert load_config(printed) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decoding.min_advantage=-0.1", "must be greater than or equal to 0; usual is 0.05 to 0.3"),
        ("decoding.gate.min_salience=5", "must be less than or equal to 2; usual is 0 to 0.5"),
        ("rewards.helpful.weight=heavy", "must be a valid number; usual is -2 to 2"),
        ("decoding.threshold=2", "must be less than 1"),
        # Units and conditions behind a range would be lost.
        ("replay.log_max_bytes=1", "must be greater than or equal to 16384"),
        ("rollout.max_unscored=0", "must be greater than or equal to 1"),
    ],
)
def test_a_number_that_is_out_of_range_is_refused_with_the_usual_range(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(find_config("quickstart"), [override])
    assert str(caught.value).endswith(f": {message}")


def test_an_override_takes_the_place_of_the_value_in_the_file(minimal: Path) -> None:
    config = load_config(minimal, ["learner.sac.policy_learning_rate=1e-4", "agent.widths=32,16"])
    assert config.learner.sac.policy_learning_rate == 1e-4
    assert config.agent.widths == (32, 16)


def test_an_override_of_a_text_setting_is_taken_literally(minimal: Path) -> None:
    config = load_config(minimal, ["llm.system_prompt=Be kind: always", "run.name=007"])
    assert config.llm.system_prompt == "Be kind: always"
    assert config.run.name == "007"
    assert load_config(minimal, ["llm.system_prompt=null"]).llm.system_prompt is None


def test_relative_paths_belong_to_where_they_are_written(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    overrides = ["prompts.evaluation=other.txt", "rewards.harmless.path=h", "rewards.harmless.weight=1"]
    config = load_config(minimal, overrides)
    assert config.prompts.train == tmp_path / "prompts.jsonl"
    assert config.prompts.evaluation == here / "other.txt"
    assert config.rewards["helpful"].path == tmp_path / "heads/helpful"
    assert config.rewards["harmless"].path == here / "h"
    assert config.run.dir == here / "runs"


def test_shipped_files_are_found_from_anywhere(minimal: Path) -> None:
    config = load_config(minimal, ["prompts.train=mara:data/prompts_train.jsonl"])
    assert config.prompts.train == SHIPPED_DIR / "data" / "prompts_train.jsonl"


def test_interpolation_reads_the_environment(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARA_TEST_URL", "redis://:secret@host:1")
    config = load_config(minimal, ["replay.redis_url=${oc.env:MARA_TEST_URL}"])
    assert config.replay.redis_url == "redis://:secret@host:1"


def test_the_name_of_the_run_is_the_name_of_the_file_unless_given(minimal: Path) -> None:
    assert load_config(minimal).run.name == "minimal"
    assert load_config(minimal, ["run.name=mine"]).run.name == "mine"


@pytest.mark.parametrize("name", ["my run", "_x", "läuft", "x" * 81])
def test_a_file_whose_name_cannot_name_a_run_is_refused_unless_another_is_given(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text(MINIMAL)
    message = error_of(path)
    assert repr(name) in message and "run.name=NAME" in message and "\n" not in message
    assert load_config(path, ["run.name=mine"]).run.name == "mine"


def test_reward_weights_reach_the_shaping_from_one_place(minimal: Path) -> None:
    config = load_config(minimal, ["rewards.helpful.weight=0.5"])
    assert config.weighted_shaping.score_weights == {"helpful": 0.5}
    assert "score_weights" not in yaml.safe_load(dump_config(config))["shaping"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("learner.batch_sice=3", ["learner.batch_sice is not a setting", "did you mean learner.batch_size?"]),
        ("rewards.helpful.wight=1", ["rewards.helpful.wight", "did you mean rewards.helpful.weight?"]),
        ("rewards.helpfull.weight=2", ["rewards.helpfull.path is missing; did you mean rewards.helpful?"]),
        ("rewards.other.weight=2", ["rewards.other.path is missing; add it"]),
        ("top_k=3", ["top_k is not a setting", "did you mean decoding.truncation.top_k?"]),
        ("learner.sac.qqq=1", ["learner.sac.qqq", "learner.sac has critic_widths"]),
        ("rollout.num_actors=two", ['rollout.num_actors="two"', "integer"]),
        ("rollout.num_actors=1.5", ["rollout.num_actors=1.5", "integer"]),
        ("learner.sac.learn_temperature=1", ["learner.sac.learn_temperature=1", "boolean"]),
        ("agent.widths=[1,x]", ['agent.widths[1]="x"', "integer"]),
        ("decoding.fallback=lst", ['decoding.fallback="lst"', "'last' or 'first'"]),
        ("learner.sac.polyak=2", ["learner.sac.polyak=2", "less than or equal to 1"]),
        ("learner=3", ["learner=3", "group of settings"]),
        ("run.name=a b", ['run.name="a b"', "must match"]),
        ("replay.connect_timeout_s=1e300", ["replay.connect_timeout_s=1e+300", "less than or equal"]),
        ("run.stop_timeout_s=1e300", ["run.stop_timeout_s=1e+300", "less than or equal"]),
        ("learner.batch_size={", ["learner.batch_size={", "not a YAML value"]),
        ("learner.batch_size", ["'learner.batch_size' is not of the form key=value"]),
        ("rollout.num_actors=-1", ["rollout.num_actors=-1", "greater than or equal to 0"]),
        ("ray.address=auto", ["ray.address=auto", "set replay.redis_url"]),
        ("rewards.helpful.weight=0", ["rewards", "every weight is 0"]),
        ("shaping.score_weights={helpful: 2}", ["shaping.score_weights", "rewards.NAME.weight"]),
    ],
)
def test_a_mistake_is_one_line_with_field_value_and_remedy(
    minimal: Path, override: str, parts: list[str]
) -> None:
    message = error_of(minimal, override)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_several_mistakes_are_several_lines(minimal: Path) -> None:
    lines = error_of(minimal, "learner.batch_sice=1", "rollout.rows=0").splitlines()
    assert len(lines) == 2
    assert {line.split("=")[0].split(" ")[0] for line in lines} == {"learner.batch_sice", "rollout.rows"}


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("llm: {}\nprompts: {train: x}\nrewards: {a: {path: x, weight: 1.0}}\n")
    assert error_of(path).startswith("llm.model is missing; add it")
    path.write_text("llm: {model: m}\nprompts: {train: x}\n")
    assert error_of(path) == "rewards is missing; add it to the configuration or give rewards.NAME.path=VALUE"
    path.write_text("llm: {model: m}\nrewards: {a: {path: x, weight: 1.0}}\n")
    assert error_of(path) == "prompts is missing; add it to the configuration or give prompts.train=VALUE"


def test_no_rewards_at_all_is_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("llm: {model: m}\nprompts: {train: x}\nrewards: {}\n")
    assert "name at least one reward head" in error_of(path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "c.yaml is not valid YAML"),
        ("a: 1\nb: c: d\n", "mapping values are not allowed in this context at line 2, column 5"),
        ("a: \x07", "at position 3"),
        ("- 1\n- 2\n", "'key: value' lines"),
        ("llm: {model: '${nope}'}", "nope"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    message = error_of(path)
    assert part in message
    assert "\n" not in message and "unicode string" not in message


def test_an_unknown_configuration_name_is_told_with_the_nearest_or_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    for name, nearest in (("quickstrat", "quickstart"), (tmp_path / "mine.yml", tmp_path / "mine.yaml")):
        with pytest.raises(UserError, match=rf"no file '{name}'; did you mean {nearest}\?$"):
            find_config(str(name))
    with pytest.raises(UserError, match=r"no file 'xyz'.* configuration \(paper/llama.*, quickstart\)"):
        find_config("xyz")
    with pytest.raises(
        UserError, match=r"no file 'xyz'.* configuration \(baselines, compare, paper/aligner.*\)"
    ):
        find_config("xyz", is_comparison=True)
    assert find_config("quickstart") == CONFIGS_DIR / "quickstart.yaml"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:s3cret@host:6379/0", "redis://me:***@host:6379/0"),
        ("redis://s3cret@host", "redis://***@host"),
        ("redis://:s3cret/?#@s3cret@host", "redis://:***@host"),
        ("redis://host/0?password=s3cret&db=1", "redis://host/0?password=***"),
        ("redis://host/0?password=a@s3cret", "redis://***"),
        ("rediss://host?ssl_Password=s3cret", "rediss://host?ssl_Password=***"),
        ("unix:///socket?pass%77ord=s3cret", "unix:///socket?pass%77ord=***"),
        (":s3cret@host", ":***@host"),
        ("redis://[::1:s3cret@x", "redis://[:***@x"),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
def test_passwords_are_printed_nowhere(minimal: Path, url: str, shown: str) -> None:
    config = load_config(minimal, [f"replay.redis_url={url}"])
    assert yaml.safe_load(dump_config(config))["replay"]["redis_url"] == shown
    assert "s3cret" not in dump_config(config) + repr(config)
    if "://" in url:
        assert hide_passwords(f"no server at {url} today") == f"no server at {shown} today"


@pytest.mark.parametrize(
    "override",
    [
        "replay=redis://:s3cret@host",
        "replay={redis_url: redis://:s3cret@host",
        "replay.connect_timeout_s=redis://host?password=s3cret",
        "replay.redis_url:redis://:s3cret@host",
    ],
)
def test_a_mistake_with_a_password_in_it_does_not_show_it(minimal: Path, override: str) -> None:
    assert "s3cret" not in error_of(minimal, override)


def test_an_empty_server_address_is_refused(minimal: Path) -> None:
    assert "replay.redis_url is empty" in error_of(minimal, "replay.redis_url=")
    assert load_config(minimal, ["replay.redis_url=null"]).replay.redis_url is None


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("[redis://:s3cret@a:1,redis://b]", ("redis://:s3cret@a:1", "redis://b")),
        ("[ 'unix:///s?db=0' , \"rediss://a\" ]", ("unix:///s?db=0", "rediss://a")),
        ("[${oc.env:MARA_TEST_URL},${oc.env:MARA_NONE,redis://x}]", ("redis://:s3cret@host", "redis://x")),
        ("[redis://a]", ("redis://a",)),
    ],
)
def test_several_servers_are_a_list_of_addresses(
    minimal: Path, text: str, urls: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARA_TEST_URL", "redis://:s3cret@host")
    config = load_config(minimal, [f"replay.redis_url={text}"])
    assert config.replay.redis_urls == config.replay.redis_url == urls
    assert "s3cret" not in dump_config(config) + repr(config)
    minimal.write_text(minimal.read_text() + f"replay: {{redis_url: {list(urls)}}}\n")
    assert load_config(minimal).replay == config.replay


@pytest.mark.parametrize(
    "override",
    [
        "replay.redis_url=[]",
        "replay.redis_url=[redis://:s3cret@a,]",
        "replay={redis_url: [redis://:s3cret@a, 5]}",
        "replay={redis_url: [[redis://:s3cret@a]]}",
        "replay={redis_url: {a: redis://:s3cret@a}}",
    ],
)
def test_what_is_no_list_of_addresses_is_one_line_without_its_password(minimal: Path, override: str) -> None:
    message = error_of(minimal, override)
    assert message.startswith("replay.redis_url ")
    assert "address" in message and "\n" not in message and "s3cret" not in message


def seconds_settings(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted keys of all settings in seconds."""
    keys = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += seconds_settings(field.annotation, f"{prefix}{name}.")
        elif name.endswith("_s"):
            keys.append(prefix + name)
    return keys


def test_every_setting_in_seconds_is_bounded_by_what_systems_can_wait_for(minimal: Path) -> None:
    keys = seconds_settings(RunConfig)
    assert {"learner.log_period_s", "replay.max_outage_s", "ray.start_timeout_s"} <= set(keys)
    for key in keys:
        message = error_of(minimal, f"{key}={LONGEST_S + 1}")
        assert message.startswith(f"{key}=") and "less than or equal to 604800" in message
        load_config(minimal, [f"{key}={LONGEST_S}", "replay.retry_longest_s=604800"])


def undocumented(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Settings without a text under them; a group of settings is described by its class."""
    missing = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            missing += undocumented(kind, f"{prefix}{name}.")
            documented = kind.__doc__
        else:
            documented = field.description
        if not documented:
            missing.append(prefix + name)
    return missing


def test_every_setting_is_documented() -> None:
    assert undocumented(RunConfig) == []


def test_settings_are_read_without_torch_ray_or_transformers() -> None:
    code = (
        "import sys; import mara.deploy.cli; from mara.deploy.config_file import *;"
        "load_config(find_config('quickstart'));"
        "print(sorted({'torch', 'ray', 'transformers', 'wandb', 'redis'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["kind=beever"], ['rewards.cost.kind="beever": did you mean beaver?']),
        (["kind=something"], ["rewards.cost.kind=", "allowed are head, beaver, ultrarm, sequence_cl"]),
        (["kind=beaver"], ["rewards.cost.model is missing; add it"]),
        (["kind=beaver", "model=m", "pth=x"], ["pth is not a setting of kind beaver; rewards.cost has"]),
        (["kind=beaver", "model=m", "path=x"], ["rewards.cost=null and this kind by another name"]),
        (["kind=beaver", "modle=m", "model=m"], ["did you mean rewards.cost.model?"]),
        (["kind=beaver", "model=m", "max_length=0"], ["rewards.cost.max_length=0: must be greater than"]),
        (["kind=sequence_classifier", "model=m", "template={x}"], ["cost: template '{x}' is not usable"]),
        (["kind=function", "function=f"], ["rewards.cost.function: 'f' is no MODULE:FUNCTION"]),
        (["kind=http", "url=host"], ["rewards.cost.url: url is not the address of a server"]),
        (["kind=http", "url=http://h/", "protocol=v"], ["allowed are 'mara', 'vllm_score' or 'classify'"]),
        (["path=x", "model=m"], ["rewards.cost.model is not a setting of kind head"]),
    ],
)  # fmt: skip
def test_a_mistake_in_a_reward_is_told_in_the_words_of_its_kind(
    minimal: Path, overrides: list[str], parts: list[str]
) -> None:
    message = error_of(minimal, "rewards.cost.weight=-1", *(f"rewards.cost.{one}" for one in overrides))
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_secret_in_the_address_of_a_reward_is_not_shown(minimal: Path) -> None:
    settings = ("kind=http", "weight=1", "url=http://me:s3cret@host/")
    message = error_of(minimal, *(f"rewards.cost.{one}" for one in settings))
    assert "rewards.cost.url" in message and "api_key_env" in message and "s3cret" not in message


def test_rewards_of_every_kind_are_read_and_printed_as_they_are(minimal: Path, tmp_path: Path) -> None:
    rewards = {
        "beaver": ["kind=beaver", "model=007", "dtype=bfloat16"],
        "ultra": ["kind=ultrarm", "model=./m", "replicas=2"],
        "pairs": ["kind=sequence_classifier", "model=m", "template=pair"],
        "mine": ["kind=function", "function=my.module:score"],
        "served": ["kind=http", "url=http://host:1/x", "template=Q {prompt} A {response}"],
    }
    overrides = [f"rewards.{name}.{one}" for name, each in rewards.items() for one in [*each, "weight=-0.5"]]
    config = load_config(minimal, overrides)
    assert config.heads.keys() == {"helpful"} and config.reward_models.keys() == rewards.keys()
    assert config.rewards["beaver"].model == "007"  # type: ignore[union-attr]
    assert config.score_weights == {"helpful": 1.0, **dict.fromkeys(rewards, -0.5)}
    printed = tmp_path / "printed.yaml"
    printed.write_text(dump_config(config))
    assert load_config(printed, ["run.name=minimal"]) == config


def test_paying_for_progress_is_refused_where_a_reward_judges_whole_answers_only(minimal: Path) -> None:
    mine = ["rewards.mine.kind=function", "rewards.mine.function=m:f", "rewards.mine.weight=0"]
    message = error_of(minimal, "shaping.terminal=progress", *mine)
    assert "shaping.terminal=progress" in message and "rewards.mine is of kind function" in message
    assert "\n" not in message
    assert load_config(minimal, ["shaping.terminal=spread", *mine]).shaping.terminal == "spread"
    assert load_config(minimal, ["shaping.terminal=progress"]).heads.keys() == {"helpful"}
