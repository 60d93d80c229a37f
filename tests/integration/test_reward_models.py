"""``mara train`` with real Ray by rewards that are no heads, a classifier and a function that is killed, and
with its log spread over two real servers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from mara.buffer.connection import connect
from mara.buffer.keys import keys_of
from mara.buffer.server import EmbeddedServer
from mara.common.agent import load_agent
from mara.deploy.run_folder import load_run

pytestmark = [pytest.mark.timeout(400), pytest.mark.long]

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


def counts_of(servers: Sequence[EmbeddedServer]) -> list[int]:
    """Episodes that were appended to the part of the log on each."""
    clients = [connect(server.url) for server in servers]
    (weights,) = clients[0].keys("mara:*:weights")
    run_id = weights.decode().split(":")[1]
    found = [client.hget(keys_of(run_id, shard).counts, "appended") for shard, client in enumerate(clients)]
    return [int(count or 0) for count in found]


def test_a_reward_model_that_is_killed_comes_back_on_two_servers_and_the_agent_is_saved_at_ctrl_c(
    mara: Callable[..., Any],
    world: Path,
    tmp_path: Path,
    check_what_a_signal_leaves: Callable[[Path, str], None],
) -> None:
    (tmp_path / "judge_of_words.py").write_text(JUDGE)
    save_classifier(tmp_path / "classifier", world / "llm")
    with EmbeddedServer(1 << 29) as one, EmbeddedServer(1 << 29) as other:
        command = mara(
            f"replay.redis_url=[{one.url},{other.url}]",
            "learner.num_episodes=1000000",
            "learner.gradient_steps_per_episode=0.05",
            "rollout.num_actors=2",  # each writes to one of the servers
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
        command.wait_until(lambda: command.records()[-1]["learner/gradient_step"] >= 1, "training")
        command.wait_until(lambda: min(counts_of((one, other))) > 0, "episodes on both servers")
        assert connect(other.url).keys("mara:*:weights") == []
        command.signal_group(signal.SIGINT)

        assert command.wait() == 130, command.text
        assert command.left_running() == []
        folder = command.run_folder
        record = (folder / "replay.json").read_text()
        assert record.count("***") == 2 and one.url not in record and other.url not in record
    check_what_a_signal_leaves(folder, command.text)
    assert "answers it was to score are dropped" in command.text
    assert load_run(folder).replay.num_shards == 2
    last = command.records()[-1]
    assert last["rewards/restarted"] == 1 and last["actors/restarted"] == 0
    assert last["weights/refused"] == last["replay/dropped"] == last["replay/malformed"] == 0
    assert 0 < last["rollout/scores_failed"] < total
    latest = {name: value for row in command.records() for name, value in row.items()}
    assert 0 < latest["episode/score/words"] <= 1
    assert abs(latest["episode/score/logit"]) > 0
    for name in ("words-0", "words-1", "logit-0"):
        assert (folder / "logs" / f"reward-{name}.log").is_file()
    _, card = load_agent(folder / "agent", hidden_size=32)
    assert card["rewards"]["words"]["settings"] == {
        "kind": "function", "function": "judge_of_words:score"
    }  # fmt: skip
