"""The baselines up to TRL: data, rewards, compute and cards. Trainings are in test_baseline_training."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

from mara.actors.config import LLMConfig
from mara.actors.head_config import HeadShape
from mara.actors.heads import HeadRewardModel, RewardHead, answer_ids
from mara.actors.llm import LLM, load_llm
from mara.common.contracts import Conversation
from mara.common.errors import UserError
from mara.common.extras import install_extra
from mara.deploy.baselines import command, compute
from mara.deploy.baselines.card import read_report, write_cards
from mara.deploy.baselines.command import baseline_settings, run_compute, take_one_gpu
from mara.deploy.baselines.compute import (
    LLMSize,
    agent_compute,
    count_logits,
    pairs_compute,
    rlhf_compute,
    size_of,
)
from mara.deploy.baselines.config import (
    AlignerSettings,
    BaselineReport,
    Data,
    DPOSettings,
    RLHFSettings,
)
from mara.deploy.baselines.material import SAME, SHARED, TOO_LONG, aligner_pairs, dpo_pairs, read_pairs
from mara.deploy.baselines.scoring import Scorer
from mara.deploy.cli import app
from mara.deploy.comparison.config import CorrectorSystem, LLMSystem, SystemConfig, fill_template
from mara.deploy.config_file import find_config, load_comparison, load_config

SIZE = LLMSize(body=100, output=10, adapter=5)


@pytest.fixture(scope="module")
def llm(llm_folder: Path) -> LLM:
    return load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu"), pack=False)


def write_pairs(path: Path, *rows: tuple[Any, str, str]) -> str:
    """A file of (prompt or messages, chosen, rejected)."""
    lines = [
        {"prompt" if isinstance(asked, str) else "messages": asked, "chosen": chosen, "rejected": rejected}
        for asked, chosen, rejected in rows
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def dpo_settings(llm: LLM, *pairs: str, **changes: Any) -> DPOSettings:
    whole: dict[str, Any] = {
        "held_out": 0.0,
        "share": (0, 1),
        "max_prompt_tokens": 20,
        "max_answer_tokens": 8,
    }
    return DPOSettings(llm=LLMConfig(model=llm.name), pairs=pairs, **{**whole, **changes})


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["baseline", *arguments])


# The command


def test_rlhf_begins_with_the_quickstarts_prompts_rewards_and_number_of_answers() -> None:
    quickstart = load_config(find_config("quickstart"))
    settings = baseline_settings("rlhf", None, [], None, ["rewards.harmless.weight=2"])
    assert isinstance(settings, RLHFSettings)
    assert settings.llm == quickstart.llm
    assert settings.prompts == quickstart.prompts.train
    assert settings.num_answers == quickstart.learner.num_episodes
    assert settings.max_new_tokens == quickstart.decoding.max_new_tokens
    assert {name: head.path for name, head in settings.rewards.items()} == {
        name: head.path for name, head in quickstart.heads.items()
    }
    assert [head.weight for head in settings.rewards.values()] == [1.0, 2.0]


def test_without_the_extra_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else found(name))
    result = run("dpo", "--pairs", "pairs.jsonl", "--out", str(tmp_path / "dpo"))
    assert result.exit_code == 2
    told = f"mara baseline needs the packages trl, peft and datasets; {install_extra('baselines')}"
    assert result.stderr == f"mara: error: {told}\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["dpo", "--pairs", "absent.jsonl"], "absent.jsonl does not exist"),
        (["dpo", "--pairs", "p.jsonl", "num_pair=5"], "did you mean num_pairs?"),
        (["dpo", "--pairs", "p.jsonl", "batch_size=6"], "no multiple of micro_batch_size=4"),
        (["dpo", "--pairs", "p.jsonl", "share=0.5,0.1"], "two rising numbers"),
        (["dpo", "--pairs", "p.jsonl", "llm.quantization=8bit"], "cannot be merged into packed weights"),
        (["dpo", "--pairs", "p.jsonl", "--pairs", "./p.jsonl"], "p.jsonl is given twice"),
        (["aligner", "--pairs", "p.jsonl", "template=better: {response}"], "template has no {prompt}"),
        (["rlhf", "num_answers=30"], "num_answers=30 is no multiple of answers_at_once=40"),
        (["rlhf", "num_answers=20", "answers_at_once=20"], "num_answers=20 are a single step"),
        (["rlhf", "--prompts", "absent.jsonl"], "absent.jsonl cannot be read"),
        (["rlhf", "rewards.helpful.path=absent"], "rewards.helpful.path"),
        (["compute", "absent"], "absent"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "check_installed", lambda: None)
    out = [] if arguments[0] == "compute" else ["--out", str(tmp_path / "out")]
    result = run(*arguments, *out)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert part in result.stderr


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "check_installed", lambda: None)
    (tmp_path / "kept").write_text("mine")
    result = run("dpo", "--pairs", "absent.jsonl", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "is not empty; give a new folder" in result.stderr


@pytest.mark.parametrize(
    ("device", "before", "visible", "loaded_on"),
    [
        ("auto", None, "0", "auto"),
        ("cuda", None, "0", "cuda"),
        ("cuda:1", None, "1", "cuda"),
        ("auto", "3, 5", "3", "auto"),
        ("cuda:1", "3, 5", "5", "cuda"),
        ("cuda:1", "GPU-a,GPU-b", "GPU-b", "cuda"),
        ("auto", "", "", "auto"),
        ("auto", "-1", "", "auto"),
        ("cpu", "3,5", "3,5", "cpu"),
    ],
)
def test_one_gpu_is_visible_that_of_the_settings(
    device: str, before: str | None, visible: str, loaded_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    taken = take_one_gpu(LLMConfig(model="m", dtype="float16", device=device))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert taken == LLMConfig(model="m", dtype="float16", device=loaded_on)


def test_a_gpu_that_is_not_there_is_named_as_the_settings_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def num_visible() -> int:
        return sum(name in ("3", "5") for name in os.environ["CUDA_VISIBLE_DEVICES"].split(","))

    monkeypatch.setattr(torch.cuda, "device_count", num_visible)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with pytest.raises(UserError, match="llm.device=cuda:2: there is no such GPU here"):
        take_one_gpu(LLMConfig(model="m", device="cuda:2"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_training_and_nothing_is_left(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(_: Any) -> None:
        with TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), number)
            raise AssertionError("the signal did not end it")

    monkeypatch.setattr(command, "check_installed", lambda: None)
    monkeypatch.setattr(command, "_on_pairs", train)
    result = run("dpo", "--pairs", "p.jsonl", "--out", str(tmp_path / "out"))
    assert result.exit_code == 130
    assert result.stderr == "mara: error: interrupted\n"
    assert not list(tmp_path.iterdir())


# Pairs


def test_pairs_are_cut_and_left_out_as_those_of_a_reward_head(tmp_path: Path, llm: LLM) -> None:
    shared = "x" * 80
    path = write_pairs(
        tmp_path / "pairs.jsonl",
        ("why", "as it", "no"),
        ("how", "this is much too long", "no"),
        ("a question that is too long", "yes", "no"),
        ("same once cut", "abcdefgh i", "abcdefgh j"),
        ("empty", "", "no"),
        *((f"q{letter}", shared, "no") for letter in "abc"),
    )
    config = dpo_settings(llm, path, seed=1)
    pairs, data = dpo_pairs(llm, read_pairs(config), config)
    spelt = {tuple(pair.prompt_ids): pair for pair in pairs}
    short, long = spelt[tuple(llm.render("why"))], spelt[tuple(llm.render("how"))]
    assert short.chosen_ids == [*answer_ids(llm, "as it"), llm.eos_ids[0]]
    assert short.rejected_ids == [*answer_ids(llm, "no"), llm.eos_ids[0]]
    assert long.chosen_ids == answer_ids(llm, "this is much too long")[:8]
    assert data.num_read == 8
    assert data.num_used == len(pairs) == 2
    assert data.left_out == {SHARED: 3, TOO_LONG: 1, SAME: 2}


def test_the_part_of_the_prompts_and_the_number_of_pairs_are_bounds(tmp_path: Path, llm: LLM) -> None:
    letters = "abcdefghijklmnopqrst"
    path = write_pairs(tmp_path / "pairs.jsonl", *((letter, "yes", "no") for letter in letters))
    whole, part, rest = (
        {tuple(pair.prompt_ids) for pair in dpo_pairs(llm, read_pairs(config), config)[0]}
        for config in (
            dpo_settings(llm, path),
            dpo_settings(llm, path, share=(0, 0.5)),
            dpo_settings(llm, path, share=(0.5, 1)),
        )
    )
    assert part and rest
    assert part | rest == whole
    assert not part & rest
    held_out = dpo_settings(llm, path, held_out=0.5)
    assert {tuple(p.prompt_ids) for p in dpo_pairs(llm, read_pairs(held_out), held_out)[0]} == rest
    few = dpo_settings(llm, path, num_pairs=7)
    drawn, data = dpo_pairs(llm, read_pairs(few), few)
    assert data.num_used == len(drawn) == 7
    assert drawn == dpo_pairs(llm, read_pairs(few), few)[0]
    other = dpo_settings(llm, path, num_pairs=7, seed=1)
    assert drawn != dpo_pairs(llm, read_pairs(other), other)[0]


def test_the_corrector_is_trained_on_what_a_comparison_asks_it(tmp_path: Path, llm: LLM) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", ("why so", "as it is", "because of that"))
    config = AlignerSettings(
        llm=LLMConfig(model=llm.name),
        pairs=(path,),
        template="better {prompt} than {response}",
        held_out=0.0,
        share=(0, 1),
        max_prompt_tokens=20,
        max_answer_tokens=9,
    )
    ((pair,), _) = aligner_pairs(llm, read_pairs(config), config)
    worse = llm.decode(answer_ids(llm, "because of that")[:9])
    assert pair.prompt_ids == llm.render(fill_template(config.template, "why so", worse))
    assert pair.chosen_ids == [*answer_ids(llm, "as it is"), llm.eos_ids[0]]


def test_the_corrector_reads_the_turns_before_the_last(tmp_path: Path, llm: LLM) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write_pairs(tmp_path / "pairs.jsonl", (messages, "yes", "no"))
    config = AlignerSettings(
        llm=LLMConfig(model=llm.name),
        pairs=(path,),
        template="{prompt}: {response}",
        held_out=0.0,
        share=(0, 1),
        max_prompt_tokens=60,
    )
    ((pair,), _) = aligner_pairs(llm, read_pairs(config), config)
    messages[-1]["content"] = fill_template(config.template, "c", llm.decode(pair.rejected_ids))
    rendered = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert pair.prompt_ids == list(rendered["input_ids"])


def test_nothing_to_train_on_is_told(tmp_path: Path, llm: LLM) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", ("why", "same", "same"))
    config = dpo_settings(llm, path)
    with pytest.raises(UserError, match="leave none to train on; give pairs with two different answers"):
        dpo_pairs(llm, read_pairs(config), config)


# Rewards


def test_an_answer_is_paid_the_weighted_scores_of_the_heads(llm: LLM) -> None:
    heads, weights = {}, {"helpful": 1.0, "cost": -0.5}
    for seed, name in enumerate(weights):
        heads[name] = RewardHead(HeadShape(hidden_size=32, width=8)).requires_grad_(False).eval()
        for parameter in heads[name].parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
        heads[name].empty_score.fill_(-3.0 - seed)
    said = [("why", "so"), ("how", "like this"), ("why", "no"), ("how", "")]
    eos = llm.eos_ids[0]
    ids = [answer_ids(llm, answer) for _, answer in said]
    ids = [ids[0], [*ids[1], eos], [*ids[2], eos], [eos]]
    told: dict[str, float] = {}
    scorer = Scorer(llm, heads, weights)
    rewards = scorer.score([prompt for prompt, _ in said], ids, told.__setitem__, trainer_state=None)
    conversations = [Conversation(prompt, answer) for prompt, answer in said]
    alone = {name: HeadRewardModel(llm, head).score(conversations) for name, head in heads.items()}
    expected = sum(weights[name] * scores_B for name, scores_B in alone.items())
    assert rewards == pytest.approx(torch.as_tensor(expected).tolist(), abs=1e-4)
    assert rewards[3] == pytest.approx(-3.0 + 0.5 * 4.0)
    assert told == {
        f"score/{name}": pytest.approx(float(scores_B.mean()), abs=1e-4) for name, scores_B in alone.items()
    }
    lengths = [len(llm.render(prompt)) for prompt, _ in said]
    assert scorer.tokens == (sum(lengths), sum(map(len, ids)), lengths[0] + lengths[1])


# Compute


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_a_pass_has_the_operations_that_torch_counts(make_model: Any, family: str) -> None:
    model = make_model(family, 0, "eager", torch.float32)
    tokens_BL = torch.zeros(2, 5, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens_BL)
    by_operator = counter.get_flop_counts()["Global"]
    # Batched products are the attention's: of states with states, not with weights.
    counted = sum(flops for operator, flops in by_operator.items() if operator != torch.ops.aten.bmm)
    assert size_of(model).read(10, 10) == counted


def test_a_frozen_layer_costs_two_passes_and_its_adapter_three() -> None:
    frozen = torch.nn.Linear(6, 4, bias=False).requires_grad_(False)
    down, up = torch.nn.Linear(6, 2, bias=False), torch.nn.Linear(2, 4, bias=False)
    states_TD = torch.ones(3, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (frozen(states_TD) + up(down(states_TD))).sum().backward()
    size = LLMSize(body=24, output=0, adapter=12 + 8)
    assert pairs_compute(size, 3, 0, has_reference=False).total == counter.get_total_flops()


def test_an_output_layer_whose_logits_are_made_again_costs_three_passes() -> None:
    output = torch.nn.Linear(6, 9, bias=False).requires_grad_(False)
    states_TD = torch.ones(3, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        made = checkpoint(lambda states: output(states).logsumexp(1), states_TD, use_reentrant=False)
        made.sum().backward()
    size = LLMSize(body=0, output=6 * 9)
    assert pairs_compute(size, 3, 3, has_reference=False).total == counter.get_total_flops()


def test_without_triton_every_position_with_a_next_token_has_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_triton in (True, False):
        monkeypatch.setattr(compute, "is_triton_available", lambda there=has_triton: there)
        assert count_logits(torch.device("cpu"), 100, 30, 8) == 92
        assert count_logits(torch.device("cuda"), 100, 30, 8) == (30 if has_triton else 92)


def test_the_compute_of_each_training_is_the_sum_of_its_parts() -> None:
    assert pairs_compute(SIZE, 7, 3, has_reference=False).total == 3190
    assert pairs_compute(SIZE, 7, 3, has_reference=True).total == 3190 + 1460
    one = 2 * (100 * 12 + 10 * 11)
    rlhf = {
        "sampling": 2 * (100 * 12 + 10 * 4) + 2 * 5 * 12,
        "log-probabilities": one + 2 * 5 * 12,
        "reference": one,
        "rewards": 2 * 100 * (2 + 4),
        "training": 4 * 100 * 12 + 6 * 10 * 11 + 6 * 5 * 12,
    }
    assert rlhf_compute(SIZE, 8, 4, 2, num_logits=11, has_reference=True).flops == rlhf
    without = rlhf_compute(SIZE, 8, 4, 2, num_logits=11, has_reference=False)
    assert without.flops == rlhf | {"reference": 0}
    agent = agent_compute(SIZE, 8, 9, 4, num_transitions=50, num_agent_parameters=3, num_critic_parameters=7)
    assert agent.flops == {"rollouts": 2 * (100 * 17 + 10 * 4) + 2 * 3 * 9, "learner": 8 * 10 * 50}


def test_the_compute_of_an_agent_follows_from_its_run(tiny_run: Any) -> None:
    folder, config = tiny_run
    rows = [
        {"episodes/total": 4, "tokens/total": 10, "learner/gradient_step": 3},
        {"episodes/total": 20, "tokens/total": 60, "learner/gradient_step": 40},
        {"rollout/decisions_total": 30, "rollout/tokens_total": 20},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    taken = run_compute(folder)
    assert taken.tokens == {
        "prompts": 20 * 9,  # <user>go: with the letters as tokens
        "candidates": 90,
        "answers": 60,
        "transitions": 40 * config.learner.batch_size,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="has no rollouts and steps of its own"):
        run_compute(folder)
    (folder / "metrics.jsonl").unlink()
    result = run("compute", str(folder))
    assert result.exit_code == 2
    assert result.stderr == (
        f"mara: error: {folder}: metrics.jsonl cannot be read (No such file or directory); "
        "give a run that has trained\n"
    )


# Cards


def report(method: Any) -> BaselineReport:
    return BaselineReport(
        method=method,
        revision="c0ffee",
        dtype="bfloat16",
        data=Data(sources={"pairs.jsonl": "ab" * 32}, num_read=9, left_out={SAME: 2}, num_used=7),
        num_steps=3,
        num_trained=1234,
        seconds=5.0,
        last={"loss": 0.5},
        compute=pairs_compute(SIZE, 7, 3, has_reference=True),
        versions={"trl": "1.16.0"},
    )


def system_in(folder: Path) -> Any:
    """What the configuration in the card gives a comparison."""
    lines = (folder / "README.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    ((_, content),) = yaml.safe_load(lines).items()
    adapter: TypeAdapter[Any] = TypeAdapter(SystemConfig)
    return adapter.validate_python(content)


def test_the_card_of_a_corrector_names_the_template_it_was_trained_with(tmp_path: Path, llm: LLM) -> None:
    template = 'Make "{response}"\nbetter: {prompt}'
    config = AlignerSettings(
        llm=LLMConfig(model=llm.name), pairs=(str(tmp_path / "pairs.jsonl"),), template=template
    )
    write_cards(tmp_path, config, report("aligner"))
    assert read_report(tmp_path) == report("aligner")
    system = system_in(tmp_path)
    assert isinstance(system, CorrectorSystem)
    assert (system.template, system.chat_template) == (template, True)
    record = json.loads((tmp_path / "baseline.json").read_text())
    assert (record["llm"], record["revision"], record["dtype"]) == (llm.name, "c0ffee", "bfloat16")
    assert f"| LLM | {llm.name} at c0ffee, in bfloat16 |" in (tmp_path / "README.md").read_text()
    for name in ("baseline.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / name).read_text()


def test_the_card_of_rlhf_names_what_is_shipped_by_its_name(tmp_path: Path) -> None:
    config = baseline_settings("rlhf", None, [], None, [])
    write_cards(tmp_path, config, report("rlhf"))
    assert isinstance(system_in(tmp_path), LLMSystem)
    settings = json.loads((tmp_path / "baseline.json").read_text())["settings"]
    assert settings["prompts"] == "mara:data/prompts_train.jsonl"
    assert settings["rewards"]["helpful"] == {
        "path": "mara:heads/helpful-smollm2-135m-instruct",
        "weight": 1.0,
    }


def test_a_damaged_card_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "baseline.json").write_text('{"method": "dpo"')
    with pytest.raises(UserError, match=r"^baseline: .*baseline\.json cannot be read \([^\n]+\); give a"):
        read_report(tmp_path)


def test_the_shipped_comparison_asks_the_corrector_what_it_is_trained_on() -> None:
    system = load_comparison(find_config("baselines", is_comparison=True)).systems["aligner"]
    settings = baseline_settings("aligner", None, ["pairs.jsonl"], None, [])
    assert isinstance(system, CorrectorSystem)
    assert isinstance(settings, AlignerSettings)
    assert system.template == settings.template
