"""The benchmarks: the peers are honest, and what is written can be read."""

from __future__ import annotations

import json
import multiprocessing
import sys

import pytest
import torch
from typer.testing import CliRunner

from mara.actors.config import DecodingConfig, TruncationConfig
from mara.actors.decoding.engine import Engine
from mara.actors.decoding.generation import Request
from mara.actors.decoding.logits import make_logit_head
from mara.actors.decoding.policies import AgentPolicy
from mara.common.agent import Agent
from mara.common.config import AgentConfig
from mara.common.errors import UserError
from mara.deploy.bench.figures import in_turn
from mara.deploy.bench.learner import bench_learner
from mara.deploy.bench.learner_step import LearnerSizes, fill, floor_s, make_mirror
from mara.deploy.bench.list_learner import ListLearner
from mara.deploy.bench.paper_procedure import answer
from mara.deploy.bench.replay import Sizes, WeightsSizes, bench_replay, bench_weights
from mara.deploy.cli import app
from mara.learner.config import SACConfig
from mara.learner.loop import Learner


@pytest.mark.parametrize("every_candidate", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_the_papers_procedure_says_what_the_engine_says(llama, every_candidate, threshold):
    torch.manual_seed(3)
    agent = Agent(32, AgentConfig(widths=(16, 8))).double()
    torch.nn.init.normal_(agent.output_linear.weight, std=4.0)
    policy = AgentPolicy(agent.eval(), threshold)
    config = DecodingConfig(truncation=TruncationConfig(top_k=5), max_new_tokens=12)
    requests = [Request(list(range(3, 8 + n)), seed=n, tag=n) for n in range(6)]
    engine = Engine(llama, [2], config, policy, 3, 16)
    for generation in engine.generate(requests):
        found = answer(
            llama, make_logit_head(llama), [2], config, policy, generation.request, every_candidate
        )
        assert found.response_ids == generation.response_ids
        singles = len(generation.response_ids) - sum(d.action for d in generation.decisions)
        if every_candidate:
            candidates = sum(d.num_candidates for d in generation.decisions if d.action)
            assert found.num_passes == singles + candidates
        else:
            assert found.num_passes == singles + len(generation.decisions)


def test_a_ring_is_filled_whatever_its_capacity():
    sizes = LearnerSizes(hidden_size=4, capacity=300)
    mirror = make_mirror(sizes, torch.device("cpu"))
    fill(mirror, sizes)
    # Whole episodes, and no room for another one.
    assert 300 - 128 < mirror.num_transitions <= 300


def test_a_batch_that_the_ring_cannot_hold_is_named_as_the_option():
    with pytest.raises(UserError, match="--batch-size=5000 is more than the 1920 transitions in the replay"):
        bench_learner(LearnerSizes(64, 5000, capacity=2000, device="cpu"), 1, None, print)


def test_rounds_are_paired_and_the_first_side_changes():
    calls = []

    def side(name, values):
        def measure(number):
            calls.append(name + str(number))
            return values[number]

        return measure

    rounds = in_turn(side("a", [4.0, 9.0, 1.0]), side("b", [2.0, 3.0, 1.0]), 3)
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert rounds.ratio == 2.0


def test_decoding_is_compared_with_generate_at_each_batch(tiny_run, tmp_path):
    folder, _ = tiny_run
    card = json.loads((folder / "agent" / "agent.json").read_text())
    (folder / "agent" / "agent.json").write_text(json.dumps({**card, "training": {"policy_steps": 0}}))
    prompts = tmp_path / "many.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"{'a' * n}?"}) for n in range(1, 9)))
    out = tmp_path / "figures.json"
    result = CliRunner().invoke(
        app,
        f"bench decode {folder} prompts.evaluation={prompts} --json {out} --rounds 1 --batch 1 --batch 4 "
        "decoding.max_new_tokens=6",
    )
    assert result.exit_code == 0, result.output
    assert "mara: warning: the agent is untrained: " in result.stderr
    assert "{" not in result.output, "a dictionary is for programs"
    for batch in (1, 4):
        told = f"batch {batch}: 8 prompts by either side, 1 times; this takes about 0."
        assert result.output.index(told) < result.output.index(f"batch {batch}, round 1")
    (line,) = [line for line in result.output.splitlines() if "new tokens 6" in line]
    assert "dtype float32, device cpu" in line and "passes_per_token" not in result.output
    figures = json.loads(out.read_text())
    assert [f["figure"] for f in figures] == ["aligned_vs_generate_batch_1", "aligned_vs_generate_batch_4"]
    for figure in figures:
        assert set(figure) == {"figure", "value", "unit", "peer", "ratio", "conditions"}
        assert figure["ratio"] == pytest.approx(
            figure["value"] / figure["conditions"]["peer_value"], rel=0.01
        )
        # Greedy generate runs its last token through no pass, and each other one through one.
        assert figure["conditions"]["theirs"]["passes_per_token"] <= 1
        assert figure["conditions"]["ours"]["positions_per_token"] >= 1


def test_rollouts_are_compared_with_the_papers_procedure(tiny_run, tmp_path):
    folder, _ = tiny_run
    out = tmp_path / "figures.json"
    result = CliRunner().invoke(
        app,
        f"bench rollout {folder} --json {out} --rounds 1 rollout.rows=2 decoding.max_new_tokens=5",
    )
    assert result.exit_code == 0, result.output
    every, stopping = json.loads(out.read_text())
    assert every["figure"] == "rollout_vs_paper_procedure"
    assert every["conditions"]["top_k"] == 40
    assert (
        every["conditions"]["theirs"]["passes_per_token"]
        > stopping["conditions"]["theirs"]["passes_per_token"]
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["bench", "decode", "{run}", "--json", "{tmp}/none/f.json"],
            "--json: there is no folder {tmp}/none",
        ),
        (["bench", "decode", "{run}", "--json", "{tmp}"], "--json: {tmp} is a folder; give a file, such as"),
        (["bench", "decode", "{run}", "learner.batch_size=3"], "learner.batch_size changes nothing here"),
        (
            ["bench", "learner", "--precision", "tf32", "--device", "cpu"],
            "--precision=tf32: only NVIDIA GPUs",
        ),
        (["bench", "decode", "{run}"], "has 4 prompts, this takes 32"),
        (["bench", "decode", "{tmp}/none"], "none does not exist; give the folder of a run"),
        (["bench", "rollout", "{run}", "decoding.fallback=first"], "the paper takes the last"),
        (["bench", "rollout", "{run}", "decoding.steering=value"], "rollouts are sampled by the policy"),
        (
            ["bench", "rollout", "{run}", "decoding.steering=value", "decoding.mode=lazy"],
            "rollouts are sampled by the policy; leave it out",
        ),
        (
            ["bench", "rollout", "{run}", "decoding.min_advantage=0.1"],
            "decoding.min_advantage changes nothing by policy; leave it out",
        ),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line_before_the_llm_is_loaded(
    tiny_run, tmp_path, arguments, says
):
    folder, _ = tiny_run
    result = CliRunner().invoke(app, [a.format(run=folder, tmp=tmp_path) for a in arguments])
    assert result.exit_code == 2
    assert says.format(tmp=tmp_path) in result.stderr and "loading" not in result.output
    assert len(result.stderr.splitlines()) == 1


def test_replay_is_measured_against_each_peer(tmp_path):
    sizes = Sizes(hidden_size=32, batch_size=16, ring_bytes=1 << 18, append_bytes=1 << 17)
    lines = []
    bench_replay(sizes, 2, tmp_path / "replay.json", lines.append)
    figures = {figure["figure"]: figure for figure in json.loads((tmp_path / "replay.json").read_text())}
    assert list(figures) == [
        "sample_vs_bare_gather",
        "sample_vs_torchrl",
        "sample_vs_cpprb",
        "insert_vs_raw_redis",
        "insert_durable_vs_raw_redis",
    ]
    for name, figure in figures.items():
        assert figure["value"] > 0 and figure["ratio"] > 0 and figure["peer"], name
        assert figure["conditions"]["hidden_size"] == 32
    assert figures["insert_durable_vs_raw_redis"]["conditions"]["append_only_file"] == "everysec"


@pytest.mark.parametrize(
    ("library", "figure"), [("torchrl", "sample_vs_torchrl"), ("cpprb", "sample_vs_cpprb")]
)
def test_a_peer_that_is_not_installed_is_left_out_aloud(tmp_path, monkeypatch, library, figure):
    for module in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    lines = []
    sizes = Sizes(hidden_size=8, batch_size=4, ring_bytes=1 << 14, append_bytes=1 << 14)
    bench_replay(sizes, 1, tmp_path / "replay.json", lines.append)
    assert f'"{figure}"' not in (tmp_path / "replay.json").read_text()
    assert any(line.startswith(f"{figure}: left out, {library}") and "'.[bench]'" in line for line in lines)


def test_every_subscriber_gets_the_last_weights(tmp_path):
    sizes = WeightsSizes(16, (8, 4), num_subscribers=3, num_publications=2, publish_period_s=0.3, poll_s=0.01)
    bench_weights(sizes, 1, tmp_path / "weights.json", lambda line: None)
    latency, look = json.loads((tmp_path / "weights.json").read_text())
    assert (latency["figure"], look["figure"]) == (
        "publish_to_applied_p95_s",
        "look_for_weights_share_of_step",
    )
    assert 0 < latency["value"] <= latency["conditions"]["largest_s"]
    assert latency["conditions"]["overtaken"] <= 3, "somebody missed the last publication"
    assert look["value"] > 0


def test_the_learner_is_measured_alone_and_on_a_log_that_grows(tmp_path):
    sizes = LearnerSizes(
        hidden_size=32, batch_size=16, widths=(16, 8), capacity=1024, peer_capacity=64, live_s=3, device="cpu"
    )
    bench_learner(sizes, 2, tmp_path / "learner.json", lambda line: None)
    figures = {figure["figure"]: figure for figure in json.loads((tmp_path / "learner.json").read_text())}
    assert list(figures) == [
        "step_vs_list_feed",
        "feed_vs_list_feed",
        "memory_vs_list_feed",
        "updates_per_s",
        "step_vs_floor",
        "live_feed_vs_static_batch",
    ]
    assert all(figure["value"] > 0 for figure in figures.values())
    assert figures["step_vs_floor"]["ratio"] < 1, "faster than the hardware"
    live = figures["live_feed_vs_static_batch"]["conditions"]
    assert live["inserted_per_s"] > 500 and live["idle_ratio"] < 0.1
    assert figures["memory_vs_list_feed"]["value"] == 2 * 32 + 22


def test_a_writer_that_dies_while_the_learner_is_measured_ends_that_with_one_line(monkeypatch):
    sizes = LearnerSizes(
        hidden_size=32,
        batch_size=16,
        widths=(16, 8),
        capacity=1024,
        peer_capacity=64,
        live_s=16,
        device="cpu",
    )
    run, seconds = Learner.run, []

    def run_without_a_writer(learner):
        (writer,) = multiprocessing.active_children()
        writer.kill()
        seconds.append(run(learner).seconds)

    monkeypatch.setattr(Learner, "run", run_without_a_writer)
    with pytest.raises(UserError, match=r"writes to the log ended early, with status -9") as caught:
        bench_learner(sizes, 1, None, lambda line: None)
    assert "\n" not in str(caught.value)
    assert seconds[0] < sizes.live_s, "it went on without"


def test_the_least_time_of_a_step_counts_each_product_and_each_weight_once():
    sizes = LearnerSizes(hidden_size=10, batch_size=3, widths=(4, 2))
    agent = {"forward": 10 * 4 + 4 * 2 + 2 * 2, "backward": 10 * 4 + 2 * (4 * 2 + 2 * 2)}
    # Agent at states and next states, critic and target with two heads each; one multiplication is two FLOPs.
    flops = 2 * 3 * (2 * agent["forward"] + 4 * agent["forward"] + 3 * agent["backward"])
    assert floor_s(sizes, flops_per_s=1.0, bytes_per_s=1e12) == pytest.approx(flops, rel=1e-6)
    weights = 3 * agent["forward"]
    target = 2 * agent["forward"]
    adam, polyak = 4 * 7 * weights, 4 * 3 * target / 10
    gradients = 4 * (2 * 3 * 10) + 4 * (weights + target) + 4 * weights
    assert floor_s(sizes, flops_per_s=1e12, bytes_per_s=1.0) == pytest.approx(
        gradients + adam + polyak, rel=1e-6
    )


def test_the_peer_of_the_learner_learns():
    sac = SACConfig(critic_widths=(16, 8), critic_learning_rate=1e-2, target_update_period=100)
    peer = ListLearner(12, (16, 8), sac, capacity=32, batch_size=32, device=torch.device("cpu"))
    batch = peer.sample()
    assert batch[0].shape == batch[3].shape == (32, 12)
    losses = [peer.update(batch) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
