"""What is wrong with a comparison is one line and status 2 before a model is loaded."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from mara.deploy.cli import app
from mara.deploy.comparison.checks import changes, check
from mara.deploy.config import RunConfig
from mara.deploy.config_file import load_comparison

Invoke = Callable[..., Result]


@pytest.fixture
def path(tmp_path: Path, tiny_run: tuple[Path, RunConfig]) -> Path:
    """A comparison of everything that a tiny run has."""
    run, config = tiny_run
    (tmp_path / "answers.jsonl").write_text(
        "".join(
            json.dumps({"prompt": prompt, "response": f"{prompt} so"}) + "\n"
            for prompt in ("why", "how so", "what", "never asked")
        )
    )
    content = {
        "llm": {"model": config.llm.model, "dtype": "float32", "device": "cpu"},
        "decoding": {"max_new_tokens": 4, "truncation": {"top_k": 4}},
        "systems": {
            "base": {"kind": "llm"},
            "mara": {"kind": "agent", "path": str(run)},
            "theirs": {"kind": "responses", "path": "answers.jsonl"},
        },
        "datasets": {"held_out": {"path": "held_out.jsonl"}},
        "judges": {name: {"path": name, "weight": 1.0} for name in ("helpful", "cost")},
        "baseline": "base",
        "dir": str(tmp_path / "runs"),
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def dry_run(path: Path) -> Invoke:
    return lambda *overrides: CliRunner().invoke(app, ["eval", str(path), *overrides, "--dry-run"])


def assert_one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith("mara: warning: ")]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("mara: error: ")
    for part in parts:
        assert part in errors[0]


def test_a_dry_run_prints_settings_that_load_to_the_same_comparison(dry_run: Invoke, path: Path) -> None:
    result = dry_run("num_actors=3")
    assert result.exit_code == 0, result.output
    assert not (path.parent / "runs").exists()
    printed = path.parent / "printed.yaml"
    printed.write_text(result.stdout)
    assert load_comparison(printed) == load_comparison(path, ["num_actors=3", "name=mine"])


def test_the_checks_find_prompts_and_answers(path: Path) -> None:
    checked = check(load_comparison(path, ["datasets.held_out.num_prompts=2"]))
    assert [prompt.prompt for prompt in checked.prompts["held_out"]] == ["why", "how so"]
    assert checked.given == {"theirs": {"held_out": ["why so", "how so so"]}}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("datasets.held_out.path=none.jsonl", ["datasets.held_out.path: ", "none.jsonl cannot be read"]),
        ("systems.mara.path=nowhere", ["systems.mara.path: ", "nowhere does not exist"]),
        ("systems.mara.model=./none", ["systems.mara.model: none has no config.json"]),
        ("systems.mara.adapter=nowhere", ["systems.mara.adapter: ", "has no adapter_config.json"]),
        ("systems.theirs.path=none", ["systems.theirs.path: ", "cannot be read"]),
        ("systems.base.model=./none", ["systems.base.model: none has no config.json"]),
        ("systems.base.adapter=nowhere", ["systems.base.adapter: ", "has no adapter_config.json"]),
        ("judges.cost.path=nowhere", ["judges.cost.path: reward head: ", "head.safetensors is missing"]),
        ("llm.model=./none", ["llm.model: none has no config.json"]),
        ("decoding.max_new_tokens=300", ["decoding.max_new_tokens=300", "can read 256 tokens"]),
        ("systems.mara.gate.min_confidenc=0.9", ["did you mean systems.mara.gate.min_confidence?"]),
        ("llm.device=gpu", ["llm.device=gpu is not a device"]),
        ("num_gpus=1000", ["num_gpus=1000 for 1 actors is more than"]),
        ("dir=/dev/null/none", ["dir=/dev/null/none", "is not a folder that can be written"]),
        ("num_actor=2", ["num_actor is not a setting; did you mean num_actors?"]),
    ],
)
def test_a_mistake_is_one_line(dry_run: Invoke, override: str, parts: list[str]) -> None:
    assert_one_line(dry_run(override), *parts)


def test_a_use_of_its_own_is_named_with_all_of_its_gate(
    dry_run: Invoke, tiny_run: tuple[Path, RunConfig]
) -> None:
    card = tiny_run[0] / "agent" / "agent.json"
    content = json.loads(card.read_text())
    content["decoding"] |= {"steering": "value", "num_compared": 3}
    content["decoding"]["gate"] |= {"max_first_probability": 0.7, "min_salience": 0.2}
    card.write_text(json.dumps(content))
    overrides = ["decoding.gate.max_first_probability=0.7"]
    (line,) = [line for line in dry_run(*overrides).stderr.splitlines() if "by itself" in line]
    assert "by value of 3, bar 0.12, gate.max_first_probability 0.7, gate.min_salience 0.2" in line
    settings = line.partition("for that add ")[2].split()
    assert "systems.mara.gate.max_first_probability=0.7" in settings
    followed = dry_run(*overrides, *settings)
    assert followed.exit_code == 0 and "by itself" not in followed.stderr


def test_a_corrector_that_uses_no_chat_template_may_have_a_bad_one(
    dry_run: Invoke, make_llm_folder: Callable[..., Path]
) -> None:
    folder = make_llm_folder(seed=5)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    corrector = (
        "systems.fixed={kind: corrector, of: base, model: %s, template: '{response}', chat_template: %s}"
    )
    assert dry_run(corrector % (folder, "false")).exit_code == 0
    assert_one_line(dry_run(corrector % (folder, "true")), "systems.fixed.model: ", "(no); use another model")


def test_an_agent_by_value_must_have_its_critic(dry_run: Invoke, tiny_run: tuple[Path, RunConfig]) -> None:
    (tiny_run[0] / "agent" / "critic.safetensors").unlink()
    by_value = "decoding.steering=value"
    assert_one_line(dry_run(by_value), "systems.mara.path: ", "add systems.mara.steering=policy")
    assert dry_run(by_value, "systems.mara.steering=policy").exit_code == 0


def test_an_agent_must_fit_the_llm_that_it_is_put_on(
    dry_run: Invoke, path: Path, make_llm_folder: Callable[..., Path]
) -> None:
    same, wider = make_llm_folder(seed=1), make_llm_folder(hidden_size=48)
    assert_one_line(dry_run(f"systems.mara.model={wider}"), "systems.mara.path: ", "hidden size")
    result = dry_run(f"systems.mara.model={same}")
    assert result.exit_code == 0 and f"this one is {same}" in result.stderr
    before, now = (
        check(load_comparison(path, overrides)) for overrides in ([], [f"systems.mara.model={same}"])
    )
    assert changes(before.identity, now.identity) == [
        "systems.mara.model is another",
        "the content of systems.mara.model has changed",
    ]


def test_an_endpoint_must_answer_and_have_its_key(dry_run: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = ("judges.big.kind=llm_judge", "judges.big.url=http://127.0.0.1:9/v1", "judges.big.model=big")
    assert_one_line(dry_run(*judge), "judges.big.url: nothing answers at http://127.0.0.1:9/v1")
    monkeypatch.delenv("BIG_KEY", raising=False)
    assert_one_line(
        dry_run(*judge, "judges.big.api_key_env=BIG_KEY"),
        "judges.big.api_key_env=BIG_KEY: this variable is not set",
    )
    monkeypatch.setenv("BIG_KEY", "s3cret\N{LEFT SINGLE QUOTATION MARK}")
    result = dry_run(*judge, "judges.big.api_key_env=BIG_KEY")
    assert_one_line(result, "judges.big.api_key_env=BIG_KEY: this variable holds no key")
    assert "s3cret" not in result.output
    assert_one_line(
        dry_run("judges.big.kind=llm_judge", "judges.big.model=big", "judges.big.url=http://h/v1?key=s3cret"),
        "url must have no password or options",
    )


def test_options_of_comparisons_do_not_go_with_runs(tiny_run: tuple[Path, RunConfig], path: Path) -> None:
    run, _ = tiny_run
    result = CliRunner().invoke(app, ["eval", str(run), "--dry-run"])
    assert_one_line(result, "--dry-run belongs to a comparison")
    result = CliRunner().invoke(app, ["eval", str(path), "--out", "x", "--resume", "y"])
    assert_one_line(result, "--out makes a new folder, --resume goes on in one")
    assert_one_line(CliRunner().invoke(app, ["eval"]), "missing argument 'RUN|CONFIG'")
    for words in ([], ["--dry-run"]):
        result = CliRunner().invoke(app, ["eval", "compar", *words])
        assert_one_line(result, "no configuration; did you mean compare?")
    assert_one_line(CliRunner().invoke(app, ["eval", "compar.yaml"]), "no file 'compar.yaml'")
    assert_one_line(CliRunner().invoke(app, ["eval", "quickstart"]), "describes a training")
    assert_one_line(CliRunner().invoke(app, ["train", "compare"]), "describes a comparison")


def test_a_folder_that_is_no_comparison_cannot_be_resumed(
    tiny_run: tuple[Path, RunConfig], path: Path
) -> None:
    run, _ = tiny_run
    result = CliRunner().invoke(app, ["eval", str(path), "--resume", str(run)])
    assert_one_line(result, f"--resume={run} has no comparison.json")


def test_a_comparison_of_somebody_else_reads_no_variable(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "s3cret")
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "comparison.json").write_text("{}")
    model = yaml.safe_load(path.read_text())["llm"]["model"]
    (folder / "config.yaml").write_text(
        path.read_text().replace(f"model: {model}", "model: x/${oc.env:TOKEN}")
    )
    result = CliRunner().invoke(app, ["eval", "--resume", str(folder)])
    assert_one_line(result, "config.yaml has ${…} in a setting")
    assert "s3cret" not in result.output


def test_a_dry_run_of_resuming_checks_that_it_is_the_same_comparison(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    shutil.copy(path, folder / "config.yaml")
    (folder / "comparison.json").write_text(json.dumps(check(load_comparison(path)).identity))
    resume = ["eval", str(path), "--resume", str(folder), "--dry-run"]
    assert CliRunner().invoke(app, resume).exit_code == 0
    assert_one_line(CliRunner().invoke(app, [*resume, "seed=9"]), "another comparison (seed is another)")


def test_a_folder_that_is_in_use_is_not_taken_for_a_new_one(path: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(path), "--out", str(tmp_path)])
    assert_one_line(result, f"--out={tmp_path} is not empty")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_another_adapter_makes_another_comparison(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    peft = ModuleType("peft")
    peft.__spec__ = ModuleSpec("peft", None)
    monkeypatch.setitem(sys.modules, "peft", peft)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    config = load_comparison(path, ["systems.tuned.kind=llm", f"systems.tuned.adapter={folder}"])
    before = check(config).identity
    assert changes(before, check(config).identity) == []
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert changes(before, check(config).identity) == ["the content of systems.tuned.adapter has changed"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], None),
        (["systems.mara.steering=value"], None),  # asked for
        (["systems.mara.steering=policy", "decoding.steering=value"], None),
        (
            ["decoding.steering=value", "decoding.min_advantage=0.3"],
            "systems.mara is used by value, bar 0.3, by itself it is used by policy; for that add "
            "systems.mara.steering=policy",
        ),
        (
            ["decoding.threshold=0.6", "decoding.gate.min_salience=0.2"],
            "systems.mara is used by policy, threshold 0.6, gate.min_salience 0.2, by itself it is used by "
            "policy; for that add systems.mara.threshold=0.5 systems.mara.gate.min_salience=0",
        ),
    ],
)
def test_another_use_of_an_agent_than_its_own_is_told(
    dry_run: Invoke, overrides: list[str], said: str | None
) -> None:
    result = dry_run(*overrides)
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if "by itself" in line]
    assert told == ([] if said is None else [f"mara: warning: {said}"])
    if said is not None:
        # By policy a bar would be refused.
        kept = [override for override in overrides if "min_advantage" not in override]
        followed = dry_run(*kept, *said.partition("for that add ")[2].split())
        assert followed.exit_code == 0 and "by itself" not in followed.stderr


def test_what_makes_another_comparison_is_named(
    path: Path, tmp_path: Path, tiny_run: tuple[Path, RunConfig]
) -> None:
    run, of_run = tiny_run
    llm = shutil.copytree(of_run.llm.model, tmp_path / "llm")  # others use that one

    def identity(*overrides: str) -> dict[str, Any]:
        return check(load_comparison(path, [f"llm.model={llm}", *overrides])).identity

    before = json.loads(json.dumps(identity()))

    def changed(*overrides: str) -> list[str]:
        return changes(before, identity(*overrides))

    assert changed() == changed("num_actors=4", "rows=2", "num_samples=1", "name=x", "ray.address=auto") == []
    assert changed("decoding.max_new_tokens=5") == ["decoding.max_new_tokens is another"]
    assert changed("systems.base.sampling=true", "seed=1") == [
        "systems.base.sampling is another",
        "seed is another",
    ]
    assert "systems.new.kind is another" in changed("systems.new.kind=llm")
    assert changed("judges.cost.weight=-2") == ["judges.cost.weight is another"]
    by_value = "systems.mara.steering=value"
    as_before = changes(identity(by_value), identity(by_value))
    before_by_value = identity(by_value)
    critic = run / "agent" / "critic.safetensors"
    content = bytearray(critic.read_bytes())
    content[-1] ^= 1
    critic.write_bytes(content)
    assert changed() == as_before == []
    now = changes(before_by_value, identity(by_value))
    assert now == ["the content of systems.mara.path has changed"]
    answers = path.parent / "answers.jsonl"
    answers.write_text(answers.read_text().replace("what so", "what no"))
    shutil.copy(path.parent / "helpful" / "head.safetensors", path.parent / "cost" / "head.safetensors")
    weights = run / "agent" / "agent.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (llm_weights,) = llm.glob("*.safetensors")
    content = bytearray(llm_weights.read_bytes())
    content[-1] ^= 1
    llm_weights.write_bytes(content)
    prompts = path.parent / "held_out.jsonl"
    prompts.write_text(prompts.read_text().replace('"what"', '"why", "category": "x"'))
    assert changed() == [
        f"the content of {name} has changed"
        for name in (
            "llm",
            "systems.mara.path",
            "systems.theirs.path",
            "judges.cost.path",
            "datasets.held_out",
        )
    ]
