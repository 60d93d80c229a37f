"""A rollout actor with a tiny LLM, against the replay log and the weight channel in memory."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

from mara.actors.config import DecodingConfig, LLMConfig, RolloutConfig, TruncationConfig
from mara.actors.decoding.generation import Generation, Request
from mara.actors.head_config import HeadShape
from mara.actors.heads import RewardHead, save_head
from mara.actors.prompts import Prompt
from mara.actors.rollout import RolloutWorker, score_prefixes
from mara.actors.scoring import Judge
from mara.buffer.codec import decode_episode, encode_episode
from mara.buffer.config import ReplayConfig
from mara.buffer.connection import connect
from mara.buffer.log import RedisEpisodeLog
from mara.buffer.memory import MemoryEpisodeLog, MemoryWeightChannel
from mara.buffer.server import EmbeddedServer
from mara.buffer.weights import RedisWeightChannel
from mara.buffer.writer import BufferedSink
from mara.common.agent import Agent, agent_digest
from mara.common.config import AgentConfig
from mara.common.episode import policy_token_logprobs
from mara.common.errors import UserError

AGENT = AgentConfig(widths=(8, 8), accept_bias=0.5)
DIGEST = agent_digest(32, AGENT)
LLM_CONFIG = {"dtype": "float32", "device": "cpu"}
DECODING = DecodingConfig(max_new_tokens=6, truncation=TruncationConfig(top_k=4))
NO_JUDGES: dict[str, Judge] = {}
PROMPTS = [Prompt(f"p{number}", text) for number, text in enumerate(["why", "how so", "what is it", "when"])]


def make_head(seed, width=8) -> RewardHead:
    head = RewardHead(HeadShape(hidden_size=32, width=width)).requires_grad_(False)
    draws = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        parameter.normal_(generator=draws)
    return head.eval()


@pytest.fixture
def make_worker(llm_folder, tmp_path):
    """Make a worker on ``sink`` and ``weights``, with two reward heads."""
    for seed, name in enumerate(("helpful", "harmless")):
        save_head(tmp_path / name, make_head(seed), {})

    def make(sink, weights, seed=0, decoding=DECODING, llm=LLM_CONFIG, judges=NO_JUDGES, **rollout):
        return RolloutWorker(
            LLMConfig(model=str(llm_folder), **llm),
            decoding,
            RolloutConfig(**{"rows": 3, "weights_poll_s": 0.0, **rollout}),
            AGENT,
            {name: tmp_path / name for name in ("helpful", "harmless")},
            PROMPTS,
            sink,
            weights,
            "actor-0",
            seed,
            judges,
        )

    return make


class StopAfter(MemoryEpisodeLog):
    """A log that stops the worker once it holds enough episodes."""

    def __init__(self, count: int, should_stop: threading.Event) -> None:
        super().__init__()
        self.kept: list = []
        self.count, self.should_stop = count, should_stop

    def append(self, episodes) -> None:
        super().append(episodes)
        self.kept += episodes
        if len(self.kept) >= self.count:
            self.should_stop.set()


def run(make_worker, count, version=1, seed=0, **settings):
    stop = threading.Event()
    log, weights = StopAfter(count, stop), MemoryWeightChannel(DIGEST)
    torch.manual_seed(5)
    weights.publish(version, Agent(32, AGENT).state_dict())
    worker = make_worker(log, weights, seed, **settings)
    worker.run(stop)
    return worker, log


def test_every_episode_is_whole_scored_and_survives_the_wire(make_worker):
    worker, log = run(make_worker, 12, version=7)
    assert len({episode.uid for episode in log.kept}) == len(log.kept) >= 12
    for episode in log.kept:
        again = decode_episode(encode_episode(episode))
        assert again.num_decisions == episode.num_decisions
        assert set(episode.policy_versions_T.tolist()) <= {7}
        assert set(episode.scores) == {"helpful", "harmless"}
        assert (policy_token_logprobs(episode) <= 1e-5).all()
        assert 1 <= episode.num_tokens <= 6
        assert episode.finish_reason == ("eos" if episode.response_ids_N[-1] == 2 else "length")
    metrics = worker.metrics()
    assert metrics["rollout/episodes_total"] == len(log.kept)
    assert metrics["rollout/tokens_total"] == sum(episode.num_tokens for episode in log.kept)
    assert metrics["rollout/policy_version"] == 7
    assert 0 <= metrics["rollout/idle_ratio"] <= 1


def test_episodes_in_which_the_first_candidate_was_retaken_survive_the_wire(make_worker):
    decoding = DecodingConfig(
        max_new_tokens=6, truncation=TruncationConfig(top_k=3, top_p=1.0), fallback="first"
    )
    _, log = run(make_worker, 40, decoding=decoding)
    retaken = [episode.forced_T & (episode.ranks_T == 0) for episode in log.kept]
    assert sum(int(retaken_T.sum()) for retaken_T in retaken) >= 5
    for episode, retaken_T in zip(log.kept, retaken, strict=True):
        again = decode_episode(encode_episode(episode))
        assert np.array_equal(again.forced_T, retaken_T) and np.array_equal(again.ranks_T, episode.ranks_T)
        # Every token was decided: each set had several candidates.
        accepted_T = again.actions_T == 1
        assert again.positions_T[accepted_T].tolist() == list(range(again.num_tokens))
        for t in np.flatnonzero(retaken_T):
            assert (again.ranks_T[t - 3 : t].tolist(), again.actions_T[t - 3 : t].tolist()) == (
                [0, 1, 2],
                [0] * 3,
            )
            assert torch.allclose(again.states_TD[t], again.states_TD[t - 3], atol=1e-2)
            chances = np.exp(again.accept_logprobs_T[t - 3 : t])
            expected = chances[0] + np.prod(1 - chances)
            assert np.exp(policy_token_logprobs(again)[t]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_answer_without_decisions_has_states_of_the_same_kind_as_the_others(make_worker, dtype):
    certain = DecodingConfig(max_new_tokens=3, truncation=TruncationConfig(top_k=1))
    llm = {"dtype": dtype, "device": "cpu"}
    for decoding in (certain, DECODING):
        _, log = run(make_worker, 3, decoding=decoding, llm=llm)
        for episode in log.kept:
            assert (episode.num_decisions == 0) == (decoding is certain)
            assert episode.states_TD.dtype == getattr(torch, dtype)
            assert episode.states_TD.shape == (episode.num_decisions, 32)


class PublishOnFirst(StopAfter):
    """A log that has other weights published when the first episodes come."""

    def __init__(self, count: int, should_stop: threading.Event, weights: MemoryWeightChannel) -> None:
        super().__init__(count, should_stop)
        self.weights = weights
        self.agents: dict[int, Agent] = {}

    def publish(self, version: int, bias: float) -> None:
        agent = Agent(32, AgentConfig(widths=(8, 8), accept_bias=bias)).eval().requires_grad_(False)
        # As if trained: the odds depend on the state.
        torch.nn.init.normal_(agent.output_linear.weight, std=0.3)
        self.agents[version] = agent
        self.weights.publish(version, agent.state_dict())

    def append(self, episodes) -> None:
        if not self.kept:
            self.publish(9, bias=-1.0)
        super().append(episodes)


def test_later_weights_are_taken_while_it_runs_and_decide(make_worker):
    stop, weights = threading.Event(), MemoryWeightChannel(DIGEST)
    log = PublishOnFirst(15, stop, weights)
    log.publish(4, bias=1.0)
    worker = make_worker(log, weights)
    worker.run(stop)
    versions = [episode.policy_versions_T.tolist() for episode in log.kept]
    assert {version for one in versions for version in one} == {4, 9}
    assert all(one == sorted(one) for one in versions)
    assert any({4, 9} <= set(one) for one in versions), "no episode was under way"
    assert set(versions[-1]) == {9}
    assert worker.metrics()["rollout/policy_version"] == 9
    for episode in log.kept:
        for version, agent in log.agents.items():
            asked_T = (episode.policy_versions_T == version) & ~episode.forced_T
            if asked_T.any():
                logprobs_T2 = agent(episode.states_TD[torch.tensor(asked_T)]).numpy()
                # The record's states are rounded to 16 bit.
                np.testing.assert_allclose(logprobs_T2[:, 1], episode.accept_logprobs_T[asked_T], atol=0.05)
                np.testing.assert_allclose(logprobs_T2[:, 0], episode.reject_logprobs_T[asked_T], atol=0.05)


def test_answers_without_a_finite_score_are_dropped_and_end_the_actor_once_they_are_most(
    make_worker, tmp_path
):
    broken = make_head(1)
    broken.base_std.fill_(0.0)  # Finite itself, unlike what is divided by it.
    save_head(tmp_path / "harmless", broken, {})
    stop, weights = threading.Event(), MemoryWeightChannel(DIGEST)
    log = StopAfter(10_000, stop)
    weights.publish(0, Agent(32, AGENT).state_dict())
    worker = make_worker(log, weights)
    with pytest.raises(UserError, match=r"rewards\.harmless\.path: no finite score for 64 of the first"):
        worker.run(stop)
    metrics = worker.metrics()
    assert metrics["rollout/scores_failed"] == 64
    # The score of an empty answer is stored in the head.
    assert all(episode.response_ids_N.tolist() == [2] for episode in log.kept)
    assert metrics["rollout/episodes_total"] == len(log.kept) < 64


class SlowSink(StopAfter):
    """A store that takes its time over every append."""

    num_appends = 0

    def append(self, episodes) -> None:
        time.sleep(0.1)
        self.num_appends += 1
        super().append(episodes)


@pytest.mark.parametrize(("slow", "idle"), [("store", True), ("heads", False)])
def test_only_waiting_for_the_store_is_idle_and_scoring_is_work(make_worker, monkeypatch, slow, idle):
    stop, weights = threading.Event(), MemoryWeightChannel(DIGEST)
    weights.publish(0, Agent(32, AGENT).state_dict())
    log = (SlowSink if slow == "store" else StopAfter)(12, stop)
    if slow == "heads":

        def scored_slowly(*arguments):
            time.sleep(0.05)
            return score_prefixes(*arguments)

        monkeypatch.setattr("mara.actors.rollout.score_prefixes", scored_slowly)
    worker = make_worker(log, weights)
    began = time.monotonic()
    worker.run(stop)
    idle_ratio, taken_s = worker.metrics()["rollout/idle_ratio"], time.monotonic() - began
    # However busy the machine is: the store alone takes so much of all the time.
    assert (idle_ratio * taken_s >= 0.1 * log.num_appends) if idle else (idle_ratio < 0.1)


def test_an_actor_goes_on_while_the_store_is_away(make_worker):
    config = ReplayConfig(retry_first_s=0.01, retry_longest_s=0.1)
    weights = MemoryWeightChannel(DIGEST)
    weights.publish(0, Agent(32, AGENT).state_dict())
    with EmbeddedServer(max_bytes=1 << 26) as server:
        client = connect(server.url)
        os.kill(server.pid, signal.SIGKILL)
        sink = BufferedSink(RedisEpisodeLog(client, "r", config), max_bytes=1 << 14)
        worker, stop = make_worker(sink, weights), threading.Event()
        thread = threading.Thread(target=worker.run, args=(stop,))
        thread.start()
        try:
            while sink.metrics["replay/dropped"] < 20:
                assert thread.is_alive()
                time.sleep(0.01)
            while server.pid is not None:
                time.sleep(0.01)
            server.start()
        finally:
            stop.set()
            thread.join()
        assert sink.close(30)
        num_stored = connect(server.url).xlen("mara:r:0:episodes")
    made, dropped = worker.metrics()["rollout/episodes_total"], sink.metrics["replay/dropped"]
    assert 0 < num_stored == made - dropped


def test_scores_are_those_of_the_heads_on_the_whole_answer_read_anew(make_worker, llm_folder):
    from mara.actors.llm import load_llm

    _, log = run(make_worker, 6)
    llm = load_llm(LLMConfig(model=str(llm_folder), **LLM_CONFIG))
    for episode in log.kept:
        prompt, response = episode.prompt_ids_P.tolist(), episode.response_ids_N.tolist()
        (states,) = llm.hidden_states([prompt + response])
        words = response[:-1] if response[-1] == 2 else response
        for seed, name in enumerate(("helpful", "harmless")):
            answer = states[len(prompt) : len(prompt) + len(words)]
            expected = make_head(seed).score_states([answer])[0]
            assert episode.scores[name] == pytest.approx(float(expected), abs=1e-4)


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(make_worker):
    answers = [
        {
            episode.uid.rsplit("-", 1)[1]: episode.response_ids_N.tolist()
            for episode in run(make_worker, 9, seed=seed)[1].kept
        }
        for seed in (1, 1, 2)
    ]
    common = answers[0].keys() & answers[1].keys()
    assert len(common) >= 9
    assert all(answers[0][key] == answers[1][key] for key in common)
    assert any(answers[0][key] != answers[2].get(key) for key in common)


def test_every_prompt_is_answered_as_often_as_asked_for(make_worker):
    stop = threading.Event()
    log, weights = StopAfter(16, stop), MemoryWeightChannel(DIGEST)
    weights.publish(0, Agent(32, AGENT).state_dict())
    make_worker(log, weights, answers_per_prompt=4).run(stop)
    asked = {int(episode.uid.rsplit("-", 1)[1]): episode.prompt_id for episode in log.kept}
    for number, prompt_id in asked.items():
        assert asked.get(number // 4 * 4, prompt_id) == prompt_id
    assert len({asked[number] for number in asked if number < 16}) == 4


def test_an_actor_makes_nothing_before_the_first_weights(make_worker):
    stop = threading.Event()
    log, weights = StopAfter(3, stop), MemoryWeightChannel(DIGEST)
    worker = make_worker(log, weights)
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    thread.join(0.3)
    assert log.kept == []
    weights.publish(0, Agent(32, AGENT).state_dict())
    thread.join(60)
    assert not thread.is_alive()
    assert len(log.kept) >= 3


OTHER_BOUND = AgentConfig(widths=(8, 8), accept_bias=0.5, max_log_odds=3.0)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (AgentConfig(widths=(4, 4), accept_bias=0.5), r"linear1\.weight is \(4, 32\), not \(8, 32\)"),
        (OTHER_BOUND, "the agent settings differ"),
    ],
)
def test_first_weights_of_another_agent_end_the_actor_with_the_reason(make_worker, config, why):
    weights = MemoryWeightChannel(agent_digest(32, config))
    weights.publish(1, Agent(32, config).state_dict())
    with pytest.raises(UserError, match=rf"version 1\) do not fit .* agent \({why}\); use the same"):
        make_worker(MemoryEpisodeLog(), weights).run(threading.Event())


def changed_weights(name, tensor):
    return {**Agent(32, AGENT).state_dict(), name: tensor}


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (OTHER_BOUND, Agent(32, OTHER_BOUND).state_dict()),
        (AGENT, changed_weights("linear2.bias", torch.zeros(9))),
        (AGENT, changed_weights("linear2.bias", torch.zeros(8, dtype=torch.float16))),
        (AGENT, changed_weights("linear2.bias", torch.full((8,), torch.nan))),
        (AGENT, changed_weights("another", torch.zeros(1))),
        (AGENT, {}),
        (AGENT, None),
    ],
)
def test_later_weights_that_are_foreign_or_damaged_are_counted_and_the_actor_goes_on(
    make_worker, caplog, config, tensors
):
    with EmbeddedServer(max_bytes=1 << 26) as server:
        client = connect(server.url)
        stop, own = threading.Event(), RedisWeightChannel(client, "r", agent_digest=DIGEST)
        log = StopAfter(1 << 30, stop)
        assert own.publish(3, Agent(32, AGENT).state_dict())
        worker = make_worker(log, RedisWeightChannel(client, "r"))
        thread = threading.Thread(target=worker.run, args=(stop,))

        def goes_on_until(condition):
            deadline = time.monotonic() + 60
            while not condition():
                assert thread.is_alive() and time.monotonic() < deadline
                time.sleep(0.01)

        try:
            with caplog.at_level("WARNING"):
                thread.start()
                goes_on_until(lambda: worker.metrics()["rollout/policy_version"] == 3)
                if tensors is None:
                    client.hset("mara:r:weights", mapping={"version": 5})
                    client.set("mara:r:tensors", b"\x08" + bytes(99))
                else:
                    foreign = RedisWeightChannel(client, "r", agent_digest=agent_digest(32, config))
                    assert foreign.publish(5, tensors)
                goes_on_until(lambda: worker.metrics()["weights/refused"] == 1)
                num_kept = len(log.kept)
                goes_on_until(lambda: len(log.kept) > num_kept + 6)
            assert worker.metrics()["weights/refused"] == 1, "the same version was looked at again"
            assert worker.metrics()["rollout/policy_version"] == 3
            (warning,) = [record.message for record in caplog.records if "refused" in record.message]
            assert "weights of version 5 are refused: " in warning and "goes on with version 3" in warning
            # The learner's next ones are taken, also where those of another agent have a higher version.
            version = 4 if config is OTHER_BOUND else 6
            assert own.publish(version, Agent(32, AGENT).state_dict())
            goes_on_until(lambda: worker.metrics()["rollout/policy_version"] == version)
        finally:
            stop.set()
            thread.join()


def test_a_prompt_that_is_too_long_is_named(make_worker):
    with pytest.raises(
        UserError, match=r"p1 has 13 tokens with its template, rollout.max_prompt_tokens is 12"
    ):
        make_worker(MemoryEpisodeLog(), MemoryWeightChannel(DIGEST), max_prompt_tokens=12)


@pytest.mark.parametrize("width", [0, 8])
@pytest.mark.parametrize("ends", [True, False])
def test_prefix_scores_are_those_of_the_prefixes_as_answers(width, ends):
    head = make_head(3, width)
    made = Generation(Request([1]), 0.0)
    made.token_states = list(torch.randn(5, 32, generator=torch.Generator().manual_seed(1)))
    made.response_ids = [9, 8, 7, 6, 2 if ends else 5]
    scores_N = score_prefixes({"a": head}, made, [2])["a"]
    expected = [float(head.score_states([torch.stack(made.token_states[: n + 1])])[0]) for n in range(5)]
    if ends:
        expected[4] = expected[3]
    np.testing.assert_allclose(scores_N, expected, atol=1e-4)


def test_an_answer_that_ends_at_once_scores_as_an_empty_one():
    head = make_head(3)
    head.empty_score.fill_(-4.0)
    made = Generation(Request([1]), 0.0)
    made.token_states, made.response_ids = [torch.randn(32)], [2]
    assert score_prefixes({"a": head}, made, [2])["a"].tolist() == [-4.0]


class Judged:
    """A reward model that counts letters, once it may, and refuses answers with an even number."""

    def __init__(self) -> None:
        self.asked: list = []
        self.may = threading.Event()

    def score(self, conversations):
        self.asked += conversations
        self.may.wait()
        counts = [float(len(conversation.response.split())) for conversation in conversations]
        return torch.tensor([count if count % 2 else float("nan") for count in counts])


def test_decoding_goes_on_while_a_reward_model_thinks_and_episodes_come_with_all_scores(
    make_worker, llm_folder
):
    from mara.actors.llm import load_llm

    judge, stop = Judged(), threading.Event()
    log, weights = StopAfter(20, stop), MemoryWeightChannel(DIGEST)
    weights.publish(0, Agent(32, AGENT).state_dict())
    worker = make_worker(log, weights, judges={"letters": Judge(judge, 1e9)}, max_unscored=10)
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    while not judge.asked:
        assert thread.is_alive()
        time.sleep(0.01)
    before = worker.metrics()["rewards/dropped"]  # From here on nothing is taken from those that wait.
    while worker.metrics()["rewards/dropped"] < before + 5:
        assert thread.is_alive()
        time.sleep(0.01)
    assert log.kept == [] and worker.metrics()["rewards/waiting"] == 10
    judge.may.set()
    thread.join(60)
    assert not thread.is_alive()
    metrics = worker.metrics()
    assert metrics["rollout/episodes_total"] == len(log.kept) >= 20
    assert metrics["rollout/tokens_total"] == sum(episode.num_tokens for episode in log.kept)
    assert metrics["rollout/scores_failed"] >= 1
    llm = load_llm(LLMConfig(model=str(llm_folder), **LLM_CONFIG))
    asked = set(judge.asked)
    texts = {prompt.id: prompt.prompt for prompt in PROMPTS}
    for episode in log.kept:
        text = llm.decode(episode.response_ids_N.tolist())
        assert (texts[episode.prompt_id], text) in asked
        assert episode.scores.keys() == {"helpful", "harmless", "letters"}
        assert episode.scores["letters"] == len(text.split()) and len(text.split()) % 2 == 1
        # Of unfinished answers only the heads know something.
        assert episode.prefix_scores.keys() == {"helpful", "harmless"}
        assert decode_episode(encode_episode(episode)).scores == pytest.approx(episode.scores)


def test_a_reward_model_that_gives_no_scores_ends_the_actor(make_worker):
    class Away:
        def score(self, conversations):
            raise ConnectionError("away")

    weights = MemoryWeightChannel(DIGEST)
    weights.publish(0, Agent(32, AGENT).state_dict())
    worker = make_worker(MemoryEpisodeLog(), weights, judges={"far": Judge(Away(), 0.0)})
    with pytest.raises(UserError, match=r"rewards\.far: no score for .* \(ConnectionError: away\)"):
        worker.run(threading.Event())
