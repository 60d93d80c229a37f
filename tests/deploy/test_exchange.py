"""``mara export`` and ``mara import``, and what is told where an agent is used otherwise than in training."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mara.actors.config import LLMConfig
from mara.common.agent import Agent, load_agent, save_agent
from mara.common.config import AgentConfig
from mara.common.critic import TwinCritic, save_critic
from mara.deploy.cli import app
from mara.deploy.config import RunConfig
from mara.deploy.config_file import dump_config
from mara.deploy.model_shape import find_identity
from mara.deploy.run_folder import load_run, load_use
from mara.deploy.run_lock import hold_run
from mara.learner.saving import AGENT_FOLDER

Run = tuple[Path, RunConfig]


def mara(*words: object, status: int = 0) -> tuple[str, list[str]]:
    """What the command prints, and the lines of its standard error but for what it is doing."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.stdout, [line for line in result.stderr.splitlines() if line.startswith("mara: ")]


def warnings(lines: list[str]) -> list[str]:
    return [line for line in lines if "warning" in line]


@pytest.fixture
def exported(tiny_run: Run, tmp_path: Path) -> Path:
    out = tmp_path / "handed" / "on"
    mara("export", tiny_run[0], "--out", out)
    return out


def test_an_exported_agent_is_the_runs_own_and_its_card_tells_what_it_was_trained_with(
    tiny_run: Run, exported: Path, tmp_path: Path
) -> None:
    folder, config = tiny_run
    names = ["agent.json", "agent.safetensors", "critic.safetensors"]
    assert sorted(path.name for path in exported.iterdir()) == names
    critic = (exported / "critic.safetensors").read_bytes()
    assert critic == (folder / AGENT_FOLDER / "critic.safetensors").read_bytes()
    assert [path.name for path in exported.parent.iterdir()] == ["on"]
    content = (exported / "agent.safetensors").read_bytes()
    assert content == (folder / AGENT_FOLDER / "agent.safetensors").read_bytes()
    card = json.loads((exported / "agent.json").read_text())
    assert card["weights_sha256"] == hashlib.sha256(content).hexdigest()
    assert card["critic_sha256"] == hashlib.sha256(critic).hexdigest()
    assert (card["hidden_size"], card["agent"]["widths"]) == (32, [16, 8])
    num_parameters = sum(value.numel() for value in load_file(exported / "agent.safetensors").values())
    assert (card["num_parameters"], card["dtype"], card["run_id"]) == (num_parameters, "float32", "run-1")
    assert (card["llm"]["model"], card["llm"]["revision"]) == (config.llm.model, None)
    assert card["states"] == {"layer": "last", "final_norm": "applied"}
    template = (Path(config.llm.model) / "chat_template.jinja").read_text()
    assert card["chat_template_sha256"] == hashlib.sha256(template.encode()).hexdigest()
    assert card["decoding"]["truncation"] == {"top_k": 4, "top_p": 0.95, "temperature": 0.8}
    assert (card["decoding"]["fallback"], card["decoding"]["threshold"]) == ("last", 0.5)
    prompts = hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest()
    assert card["training_data"] == {"prompts": "train.jsonl", "sha256": prompts, "num_prompts": 1}
    assert card["rewards"]["cost"]["weight"] == -0.5 and len(card["rewards"]["cost"]["sha256"]) == 2
    assert card["training"]["gradient_steps"] == 40 and card["training"]["episodes"] == 20
    assert card["versions"]["torch"] == torch.__version__
    assert card["versions"].keys() == {"mara", "torch", "transformers"}
    assert card["shaping"]["score_weights"] == {} and card["learner"]["batch_size"] == 1024


def test_an_exported_agent_answers_as_its_run_does_also_where_the_run_is_gone(
    tiny_run: Run, exported: Path
) -> None:
    folder, _ = tiny_run
    of_run, lines = mara("generate", folder, "why")
    assert "with the agent" in of_run and not lines
    shutil.rmtree(folder)
    assert mara("generate", exported, "why") == (of_run, [])
    _, lines = mara("generate", exported, "why", "learner.num_episodes=5", status=2)
    assert "learner is not a setting" in lines[0]


def test_an_exported_agent_is_compared_with_prompts_and_heads_that_are_given(
    tiny_run: Run, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"rewards.{name}.path={tmp_path / name}" for name in ("helpful", "cost")]
    _, lines = mara("eval", exported, *given, status=2)
    assert "prompts.evaluation is not set" in lines[0]
    held_out = f"prompts.evaluation={tmp_path / 'held_out.jsonl'}"
    _, lines = mara("eval", exported, held_out, status=2)
    assert "rewards.helpful.path" in lines[0] and "is missing" in lines[0]
    files = sorted(exported.iterdir())
    monkeypatch.chdir(tmp_path)
    _, lines = mara("eval", exported, held_out, "evaluation.num_prompts=3", *given)
    assert not lines
    mara("eval", exported, held_out, "evaluation.num_prompts=3", *given, "--out", tmp_path / "found")
    assert sorted(exported.iterdir()) == files
    mara("eval", tiny_run[0])
    (new,) = (tmp_path / "runs").iterdir()
    places = (new, tmp_path / "found", tiny_run[0])
    reports = [json.loads((folder / "report.json").read_text()) for folder in places]
    assert reports[0]["pairs"] == reports[1]["pairs"] == reports[2]["pairs"]
    assert reports[0]["training"] == reports[2]["training"]
    assert reports[0]["training"]["gradient_steps"] > 0
    _, lines = mara("eval", exported, held_out, *given, "--out", tmp_path / "found", status=2)
    assert f"--out={tmp_path / 'found'} is not empty" in lines[0]


def test_what_is_there_already_is_not_overwritten_and_nothing_is_left_half_done(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = tiny_run
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("kept")
    _, lines = mara("export", folder, "--out", full, status=2)
    assert f"--out={full} is not empty" in lines[0]
    assert [path.name for path in full.iterdir()] == ["mine"]
    _, lines = mara("export", folder, "--out", full / "mine", status=2)
    assert "is not a folder" in lines[0]
    (tmp_path / "empty").mkdir()
    mara("export", folder, "--out", tmp_path / "empty")
    load_agent(tmp_path / "empty", hidden_size=32)

    def fail(*_paths: object) -> None:
        raise OSError(28, os.strerror(28))

    before = set(tmp_path.iterdir())
    monkeypatch.setattr("mara.deploy.exchange.seal_agent", fail)
    _, lines = mara("export", folder, "--out", tmp_path / "new", status=1)
    assert "No space left" in lines[-1]
    assert set(tmp_path.iterdir()) == before


def test_a_run_that_goes_on_or_has_no_agent_is_not_exported(tiny_run: Run, tmp_path: Path) -> None:
    folder, _ = tiny_run
    card = folder / AGENT_FOLDER / "agent.json"
    content = json.loads(card.read_text())
    wanted = load_run(folder).learner.num_episodes
    # Trained; not yet; trained and gone on with, by settings that ask for more.
    for complete, episodes, status in ((True, wanted, 0), (False, wanted, 2), (True, wanted - 1, 2)):
        training = {**content["training"], "complete": complete, "episodes": episodes}
        card.write_text(json.dumps({**content, "training": training}))
        with hold_run(folder):
            _, lines = mara("export", folder, "--out", tmp_path / f"out-{complete}-{episodes}", status=status)
        assert (tmp_path / f"out-{complete}-{episodes}").is_dir() == (status == 0)
        assert status == 0 or "its training goes on" in lines[0]
    _, lines = mara("export", tmp_path / f"out-True-{wanted}", "--out", tmp_path / "out", status=2)
    assert "is an exported agent; copy the folder" in lines[0]
    shutil.rmtree(folder / AGENT_FOLDER)
    _, lines = mara("export", folder, "--out", tmp_path / "out", status=2)
    assert "has no agent" in lines[0]
    _, lines = mara("export", tmp_path, "--out", tmp_path / "out", status=2)
    assert "is not a run folder" in lines[0]
    assert not (tmp_path / "out").exists()
    (tmp_path / f"out-True-{wanted}" / "agent.json").unlink()
    _, lines = mara("generate", tmp_path / f"out-True-{wanted}", "hello", status=2)
    assert "has the weights of an agent without its card (agent.json)" in lines[0]


def test_weights_that_are_not_those_of_the_card_are_refused(exported: Path) -> None:
    other, card = load_agent(exported)
    with torch.no_grad():
        other.output_linear.bias.add_(1.0)
    own = (exported / "agent.safetensors").read_bytes()
    save_agent(other, exported, card)
    _, lines = mara("generate", exported, "why", status=2)
    assert len(lines) == 1 and "its card says" in lines[0]
    (exported / "agent.safetensors").write_bytes(own)
    save_critic(TwinCritic(32, (16, 8)), exported)
    mara("generate", exported, "why")
    _, lines = mara("generate", exported, "why", "decoding.steering=value", status=2)
    assert len(lines) == 1 and "critic.safetensors has SHA-256" in lines[0]
    # One that was put beside an agent that was handed on without any.
    card = json.loads((exported / "agent.json").read_text())
    del card["critic_sha256"]
    (exported / "agent.json").write_text(json.dumps(card))
    _, lines = mara("generate", exported, "why", "decoding.steering=value", status=2)
    assert len(lines) == 1 and "is another agent's: the card knows of none" in lines[0]


def test_an_exported_agent_is_exported_again_for_another_use(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    mara("export", exported, "--out", out, "decoding.threshold=0.3")
    assert load_use(out).decoding.how == "by policy, threshold 0.3"
    ours, theirs = (json.loads((folder / "agent.json").read_text()) for folder in (out, exported))
    assert {name for name in ours if ours[name] != theirs[name]} == {
        "decoding"
    } and ours.keys() == theirs.keys()
    _, (line,) = mara("train", "--resume", exported, status=2)
    assert f"{exported} is an exported agent, not a run" in line


def test_an_import_with_a_template_that_loses_the_prompt_is_refused(
    pth: Path, llm_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _, lines = mara("import", pth, "--out", out, "--llm", llm_folder, "llm.chat_template={#-#}:", status=2)
    assert len(lines) == 1 and "llm.chat_template leaves out the prompt" in lines[0] and not out.exists()


def test_a_chat_template_of_the_settings_goes_with_the_agent(tiny_run: Run, tmp_path: Path) -> None:
    run, config = tiny_run
    template = "Q: {{ messages[-1].content }}\nA:"
    own = config.model_copy(update={"llm": config.llm.model_copy(update={"chat_template": template})})
    digest = hashlib.sha256(template.encode()).hexdigest()
    assert find_identity(own.llm).template_digest == digest != find_identity(config.llm).template_digest
    (run / "config.yaml").write_text(dump_config(own))
    assert load_run(run).llm.chat_template == template
    _, lines = mara("generate", run, "why")
    assert any("the LLM's chat template is SHA-256" in line for line in lines)
    agent = run / AGENT_FOLDER / "agent.json"
    card = json.loads(agent.read_text())
    card["llm"]["chat_template"], card["chat_template_sha256"] = template, digest
    agent.write_text(json.dumps(card))
    mara("export", run, "--out", tmp_path / "out")
    assert load_use(tmp_path / "out").llm.chat_template == template
    _, lines = mara("generate", tmp_path / "out", "why")
    assert lines == []
    _, lines = mara("generate", tmp_path / "out", "why", "llm.chat_template={#-#}:", status=2)
    assert len(lines) == 1 and "llm.chat_template leaves out the prompt" in lines[0]


def test_an_export_takes_the_settings_that_a_calibration_named(tiny_run: Run, tmp_path: Path) -> None:
    run, out = tiny_run[0], tmp_path / "calibrated"
    mara("export", run, "--out", out, "decoding.steering=value", "decoding.min_advantage=0.3")
    decoding = load_use(out).decoding
    assert decoding.how == "by value, bar 0.3" and decoding.truncation.top_k == 4
    assert load_run(run).decoding.how == "by policy"
    refused = {
        "evaluation.rows=3": "evaluation.rows changes nothing here",
        "decoding.min_advantage=0.3": "decoding.min_advantage changes nothing by policy",
    }
    (run / AGENT_FOLDER / "critic.safetensors").unlink()
    refused["decoding.steering=value"] = "decoding.steering=value needs a critic"
    for number, (setting, says) in enumerate(refused.items()):
        _, lines = mara("export", run, "--out", tmp_path / str(number), setting, status=2)
        assert len(lines) == 1 and says in lines[0] and not (tmp_path / str(number)).exists()


def test_an_agent_that_has_no_critic_of_its_own_is_exported_without(
    tiny_run: Run, exported: Path, tmp_path: Path
) -> None:
    run, config = tiny_run
    by_value = config.decoding.model_copy(update={"steering": "value"})
    (run / "config.yaml").write_text(dump_config(config.model_copy(update={"decoding": by_value})))
    agent = run / AGENT_FOLDER
    card = json.loads((exported / "agent.json").read_text())
    sealed = {"weights_sha256": card["weights_sha256"]}  # without a critic: the file is somebody else's
    own = json.loads((agent / "agent.json").read_text()) | sealed
    own["decoding"]["steering"] = "value"
    (agent / "agent.json").write_text(json.dumps(own))
    out = tmp_path / "without"
    _, lines = mara("export", run, "--out", out)
    assert any("the run goes by value and has no critic" in line for line in lines)
    assert sorted(path.name for path in out.iterdir()) == ["agent.json", "agent.safetensors"]


@pytest.mark.parametrize("content", ["{", "[]", '{"llm": "tiny"}', '{"llm": {}}'])
def test_a_card_that_cannot_be_used_is_one_line(exported: Path, content: str) -> None:
    (exported / "agent.json").write_text(content)
    _, lines = mara("generate", exported, "why", status=2)
    assert len(lines) == 1 and "agent.json cannot be read" in lines[0]


def test_a_card_from_somebody_else_reads_no_variables_of_the_environment(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_TOKEN", "s3cret")
    card = json.loads((exported / "agent.json").read_text())
    card["llm"]["model"] = "nobody/${oc.env:A_TOKEN}"
    (exported / "agent.json").write_text(json.dumps(card))
    _, (line,) = mara("generate", exported, "why", status=2)
    assert "agent.json has ${…} in a setting" in line and "s3cret" not in line


@pytest.mark.parametrize("command", ["run", "exported"])
def test_what_differs_from_the_training_is_a_line_each_with_both_values_and_what_to_do(
    tiny_run: Run, exported: Path, make_llm_folder: Callable[..., Path], command: str
) -> None:
    folder, config = tiny_run
    place = folder if command == "run" else exported
    _, lines = mara("generate", place, "why", "decoding.truncation.top_k=6", "llm.system_prompt=be kind")
    assert len(lines) == 2
    assert "warning: llm.system_prompt=be kind, the agent was trained with null; give" in lines[0]
    assert (
        "decoding.truncation.top_k=6, the agent was trained with 4; give decoding.truncation.top_k=4"
        in (lines[1])
    )
    _, (line,) = mara("generate", place, "why", "llm.revision=v2")
    assert "llm.revision=v2, the agent was trained with null" in line

    other = make_llm_folder(seed=3)
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}?")
    _, lines = mara("generate", place, "why", f"llm.model={other}")
    assert len(lines) == 2
    assert f"trained for the LLM {config.llm.model}, this one is {other}" in lines[0]
    digest = hashlib.sha256(b"{{ messages[0]['content'] }}?").hexdigest()
    assert f"chat template is SHA-256 {digest[:12]}…, the agent was trained with SHA-256" in lines[1]
    wide = make_llm_folder(hidden_size=64)
    _, (line,) = mara("generate", place, "why", f"llm.model={wide}", status=2)
    assert "hidden size 32, the LLM has 64" in line


def test_an_agent_of_other_hidden_states_is_told_of(exported: Path) -> None:
    card = json.loads((exported / "agent.json").read_text())
    card["states"]["final_norm"] = "not applied"
    (exported / "agent.json").write_text(json.dumps(card))
    _, (line,) = mara("generate", exported, "why")
    assert "final norm not applied, here it is applied" in line


def test_another_commit_of_a_hub_model_is_told_of_and_other_names_of_one_commit_are_not(
    exported: Path, tmp_path: Path, llm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "models--org--tiny"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(llm_folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "refs" / "v2").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, card = load_agent(exported)
    assert find_identity(LLMConfig(model="org/tiny")).commit == "a" * 40
    card["llm"]["model"], card["llm_commit"] = "org/tiny", "a" * 40
    (exported / "agent.json").write_text(json.dumps(card))
    assert mara("generate", exported, "why")[1] == []
    assert mara("generate", exported, "why", "llm.revision=" + "a" * 40)[1] == []
    _, (line,) = mara("generate", exported, "why", "llm.revision=v2")
    assert f"org/tiny is at commit {'b' * 40}, the agent was trained with {'a' * 40}; give llm.rev" in line


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    """A file as the authors', in half precision, for the tiny LLM."""
    torch.manual_seed(0)
    agent = Agent(32, AgentConfig(widths=(16, 8)))
    torch.nn.init.normal_(agent.output_linear.weight, std=4.0)
    torch.save(agent.half().state_dict(), tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


def test_an_imported_agent_answers_and_its_card_says_where_it_comes_from(
    pth: Path, llm_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "imported"
    settings = ["llm.dtype=float32", "decoding.max_new_tokens=4", "decoding.truncation.top_k=4"]
    mara("import", pth, "--out", out, "--llm", llm_folder, *settings)
    agent, card = load_agent(out, hidden_size=32)
    source = torch.load(pth, weights_only=True)
    torch.testing.assert_close(agent.linear1.weight, source["linear1.weight"].float(), rtol=0, atol=0)
    assert card["imported_from"] == {
        "file": "theirs.pth",
        "sha256": hashlib.sha256(pth.read_bytes()).hexdigest(),
    }
    assert (card["llm"]["model"], card["decoding"]["truncation"]["top_k"]) == (str(llm_folder), 4)
    # As in the authors' evaluation.
    assert card["llm"]["doubled_bos"] and card["decoding"]["fallback"] == "first"
    shown, lines = mara("generate", out, "why")
    assert "with the agent" in shown and not lines
    _, (line,) = mara("generate", out, "why", "decoding.truncation.top_p=0.5")
    assert "decoding.truncation.top_p=0.5, the agent was trained with 0.95" in line
    (tmp_path / "some.txt").write_text("why")
    _, (line,) = mara("eval", out, f"prompts.evaluation={tmp_path / 'some.txt'}", status=2)
    assert "rewards is empty" in line and "rewards.NAME.path" in line


def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(
    pth: Path, make_llm_folder: Callable[..., Path], llm_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "imported"
    wide = make_llm_folder(hidden_size=64)
    _, (line,) = mara("import", pth, "--out", out, "--llm", wide, status=2)
    assert "hidden size 32" in line and "has 64" in line
    _, (line,) = mara("import", pth, "--out", out, "--llm", llm_folder, "run.seed=3", status=2)
    assert "run.seed changes nothing here" in line
    _, (line,) = mara("import", pth, "--out", out, "--llm", llm_folder, "decoding.steering=value", status=2)
    assert "needs a critic, and the authors released none" in line
    _, (line,) = mara("import", pth, "--out", out, "--llm", llm_folder, "decoding.min_advantage=1", status=2)
    assert "decoding.min_advantage changes nothing by policy; leave it out" in line
    pth.write_bytes(b"not torch at all")
    _, (line,) = mara("import", pth, "--out", out, "--llm", llm_folder, status=2)
    assert "fetch it again" in line
    assert not out.exists() and not list(tmp_path.glob(".*"))
