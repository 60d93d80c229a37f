"""``mara train`` by rewards that are no heads, with real Ray: a classifier, and a function that is killed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mara.common.agent import load_agent

pytestmark = pytest.mark.timeout(400)

JUDGE = """
import os, sys, time

def score(prompts, responses):
    time.sleep(0.2)  # so that the death finds it at work
    # Tried beforehand where the run starts, called by a process that was given no GPU.
    assert "ray" not in sys.modules or os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert len(prompts) == len(responses)
    return [len(response.split()) / 8 for response in responses]
"""


def save_classifier(folder: Path, llm: Path) -> None:
    """A Llama with one logit and random weights, and the tokenizer of the tiny LLM."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(llm)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llm).save_pretrained(folder)


def hosts_of(command: Any) -> list[psutil.Process]:
    return [p for p in command.processes() if p.name().startswith("ray::RewardHost")]


def opened_log(process: psutil.Process) -> str:
    """Where its output goes."""
    return str(Path(f"/proc/{process.pid}/fd/1").resolve())


def test_a_reward_model_that_is_killed_comes_back_and_what_it_was_scoring_is_dropped_and_counted(
    mara: Callable[..., Any], world: Path, tmp_path: Path
) -> None:
    (tmp_path / "judge_of_words.py").write_text(JUDGE)
    save_classifier(tmp_path / "classifier", world / "llm")
    command = mara(
        "learner.num_episodes=1000000",
        "learner.gradient_steps_per_episode=0.05",
        "rollout.num_actors=1",
        "rewards.words.kind=function",
        "rewards.words.function=judge_of_words:score",
        "rewards.words.weight=0.5",
        "rewards.words.replicas=2",
        "rewards.words.num_cpus=0.25",
        "rewards.words.timeout_s=20",
        "rewards.logit.kind=sequence_classifier",
        "rewards.logit.model=classifier",
        "rewards.logit.weight=0",
        "rewards.logit.num_cpus=0.25",
        f"prompts.evaluation={world / 'prompts.jsonl'}",
        "wandb.mode=disabled",
    )
    command.wait_until(
        lambda: command.records() and command.records()[-1]["episodes/total"] >= 40, "episodes"
    )
    before = hosts_of(command)
    assert len(before) == 3
    judges = [p for p in before if "reward-words" in opened_log(p)]
    judges[0].kill()
    command.wait_until(lambda: "died and was started again" in command.text, "a new process")
    total = command.records()[-1]["episodes/total"]
    command.wait_until(lambda: command.records()[-1]["episodes/total"] > total + 100, "more episodes")
    command.wait_until(lambda: len(hosts_of(command)) == 3, "three processes again")
    command.signal_group(signal.SIGINT)

    assert command.wait() == 0, command.text
    assert command.left_running() == []
    assert "Traceback" not in command.text
    assert "answers it was to score are dropped" in command.text
    folder = command.run_folder
    last = command.records()[-1]
    assert last["rewards/restarted"] == 1 and last["actors/restarted"] == 0
    assert last["replay/dropped"] == last["replay/malformed"] == 0
    assert 0 < last["rollout/scores_failed"] < total
    assert 0 < last["episode/score/words"] <= 1
    assert abs(last["episode/score/logit"]) > 0
    for name in ("words-0", "words-1", "logit-0"):
        assert (folder / "logs" / f"reward-{name}.log").is_file()
    _, card = load_agent(folder / "agent", hidden_size=32)
    assert card["rewards"]["words"]["settings"] == {
        "kind": "function", "function": "judge_of_words:score"
    }  # fmt: skip
