"""Agents that are steered by value: the engine against a plain loop, and who may be used so."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mara.actors.config import DecodingConfig, GateConfig, TruncationConfig
from mara.actors.decoding import engine as engine_module
from mara.actors.decoding.candidates import truncate
from mara.actors.decoding.engine import Engine
from mara.actors.decoding.generation import Request
from mara.actors.decoding.policies import AgentPolicy, Gated, ValuePolicy, most_demanding, steered_by
from mara.common.agent import ACCEPT, Agent
from mara.common.config import AgentConfig
from mara.common.critic import TwinCritic

EOS = 2


def make_requests(seed, lengths):
    rng = np.random.default_rng(seed)
    return [
        Request(rng.integers(3, 61, size=length).tolist(), tag=index) for index, length in enumerate(lengths)
    ]


def make_agent(hidden_size, seed=0):
    """Random, and undecided: some accept, some reject."""
    torch.manual_seed(seed)
    agent = Agent(hidden_size, AgentConfig(widths=(16, 8), accept_bias=0.0)).eval()
    with torch.no_grad():
        agent.output_linear.weight.mul_(100)
    return agent


def make_critic(hidden_size, seed=0):
    """Random, with values that differ between candidates by tenths."""
    torch.manual_seed(seed)
    critic = TwinCritic(hidden_size, (16, 8)).eval()
    with torch.no_grad():
        critic.output_linear.weight_HIO.mul_(100)
    return critic


def compared(model, config, critic, request, gate):
    """Batch 1, no cache: at each position every candidate in a sequence of its own, valued by the critic.

    Returns tokens, finish reason, and (action, rank, candidates, position) of everything compared.
    """
    tokens, rows = [], []

    def run(ids):
        out = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        return out.logits[0, -1:], out.hidden_states[-1][0, -1]

    while len(tokens) < config.max_new_tokens:
        logits, before = run([*request.prompt_ids, *tokens])
        found = truncate(logits, config.truncation)
        ids = found.ids_BK[0, : int(found.num_B[0])].tolist()
        chosen = 0
        if len(ids) > 1 and logits[0].softmax(-1).max() <= gate.max_first_probability:
            asked = ids[: config.num_compared]
            states = [run([*request.prompt_ids, *tokens, token])[1] for token in asked]
            values = [critic(state[None])[:, 0, ACCEPT].mean().item() for state in states]
            best = int(np.argmax(values))
            turn = 1 - states[0] @ before / (states[0].norm() * before.norm())
            if values[best] - values[0] >= config.min_advantage and float(turn) >= gate.min_salience:
                chosen = best
            rows += [(int(rank == chosen), rank, len(ids), len(tokens)) for rank in range(len(asked))]
        tokens.append(ids[chosen])
        if tokens[-1] == EOS:
            return tokens, "eos", rows
    return tokens, "length", rows


@pytest.mark.parametrize("repeats", [False, True])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    rows=st.integers(1, 5),
    top_k=st.integers(1, 9),
    num_compared=st.integers(2, 6),
    min_advantage=st.sampled_from([0.0, 0.03, 0.1, 100.0]),
    mode=st.sampled_from([("lazy", 3), ("wide", 1), ("wide", 3), ("auto", 3)]),
    gate=st.builds(
        GateConfig,
        max_first_probability=st.sampled_from([0.03, 0.05, 1.0]),
        min_salience=st.sampled_from([0.0, 0.95, 1.1]),
    ),
    beside=st.booleans(),
)
def test_by_value_the_engine_equals_a_plain_comparison_of_the_candidates(
    llama, seed, lengths, rows, top_k, num_compared, min_advantage, mode, gate, beside, repeats
):
    """Also where rows that ask the agent are decoded beside, and where passes have few shapes."""
    config = DecodingConfig(
        truncation=TruncationConfig(top_k=top_k, top_p=0.9),
        max_new_tokens=6,
        num_compared=num_compared,
        min_advantage=min_advantage,
        mode=mode[0],
        window=mode[1],
    )
    critic = make_critic(llama.config.hidden_size, seed)
    agent = AgentPolicy(make_agent(llama.config.hidden_size, seed), 0.5)
    value = ValuePolicy(critic, min_advantage)
    steered = value if gate.is_open else Gated(value, gate)
    requests = [
        replace(request, policy=agent if beside and request.tag % 2 else steered)
        for request in make_requests(seed, lengths)
    ]
    alone = {
        g.request.tag: g
        for g in Engine(llama, [EOS], config, agent, rows, max(lengths)).generate(
            [request for request in requests if request.policy is agent]
        )
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "repeats_shapes", lambda model: repeats)
        engine = Engine(
            llama, [EOS], config, most_demanding(request.policy for request in requests), rows, max(lengths)
        )
        answers = {generation.request.tag: generation for generation in engine.generate(requests)}
    for request in requests:
        found = answers[request.tag]
        decided = [(d.action, d.rank, d.num_candidates, d.position) for d in found.decisions]
        if request.policy is agent:
            other = alone[request.tag]
            expected = other.response_ids, other.finish_reason
            rows_compared = [(d.action, d.rank, d.num_candidates, d.position) for d in other.decisions]
        else:
            *expected, rows_compared = compared(llama, config, critic, request, gate)
            assert not any(decision.forced for decision in found.decisions)
        assert (found.response_ids, found.finish_reason) == tuple(expected)
        assert decided == rows_compared


def test_a_higher_bar_steps_in_less_often_and_an_unreachable_one_never(llama):
    critic = make_critic(llama.config.hidden_size)
    config = DecodingConfig(truncation=TruncationConfig(top_k=5, top_p=1.0), max_new_tokens=8)
    requests = make_requests(1, [3, 5, 7, 9])

    def answers(policy):
        found = Engine(llama, [], config, policy, 4, 9).generate(requests)
        return sorted(found, key=lambda generation: generation.request.tag)

    by_bar = [answers(ValuePolicy(critic, bar)) for bar in (0.0, 0.05, 1e6)]
    changed = [sum(d.rank > 0 for g in found for d in g.decisions if d.action) for found in by_bar]
    assert changed[0] > changed[1] > changed[2] == 0
    assert all(sum(d.action for d in g.decisions) == 8 for found in by_bar for g in found)
    assert [g.response_ids for g in by_bar[2]] == [g.response_ids for g in answers("greedy")]


def test_beside_rows_that_compare_the_others_examine_as_many_and_nothing_is_learnt_of_windows(
    llama, monkeypatch
):
    asked, told = [], []
    monkeypatch.setattr(
        engine_module.WindowTuner, "window", lambda self, num_rows: asked.append(num_rows) or 1
    )
    monkeypatch.setattr(engine_module.WindowTuner, "measured", lambda self, *passed: told.append(passed))
    config = DecodingConfig(
        truncation=TruncationConfig(top_k=5, top_p=1.0), max_new_tokens=12, num_compared=5
    )
    value = ValuePolicy(make_critic(llama.config.hidden_size), 0.05)
    by_policy = AgentPolicy(make_agent(llama.config.hidden_size), 0.5)

    def passes(*policies):
        engine = Engine(llama, [], config, most_demanding(policies), len(policies), 9)
        requests = make_requests(4, [9] * len(policies))
        list(engine.generate(replace(r, policy=p) for r, p in zip(requests, policies, strict=True)))
        return engine.num_passes

    alone = passes(by_policy, by_policy)
    assert alone > 13 and len(asked) == len(told) == alone - 1
    asked.clear()
    told.clear()
    assert passes(by_policy, by_policy, value) == 13 and asked == told == []


@pytest.mark.parametrize("mode", ["auto", "wide"])
def test_agents_of_several_critics_and_bars_answer_together_as_alone(llama, mode):
    hidden_size = llama.config.hidden_size
    critics = [make_critic(hidden_size, seed) for seed in (0, 1)]
    policies = [
        *(ValuePolicy(critic, bar) for critic in critics for bar in (0.0, 0.08)),
        Gated(ValuePolicy(critics[1], 0.0), GateConfig(max_first_probability=0.5)),
        AgentPolicy(make_agent(hidden_size), threshold=0.5),
        "greedy",
    ]
    config = DecodingConfig(
        truncation=TruncationConfig(top_k=5, top_p=1.0), max_new_tokens=8, num_compared=4, mode=mode
    )
    asked = make_requests(2, [3, 5, 7, 9])

    def answers(of, rows):
        requests = [
            replace(request, policy=policies[number], tag=(number, request.tag))
            for request in asked
            for number in of
        ]
        engine = Engine(llama, [EOS], config, most_demanding(policies), rows, 9)
        return {found.request.tag: found.response_ids for found in engine.generate(requests)}

    together = answers(range(len(policies)), 5)
    alone = {tag: ids for number in range(len(policies)) for tag, ids in answers([number], 1).items()}
    assert together == alone
    # Each of them says something else, or the wrong one's values would not be seen.
    said = [[together[number, request.tag] for request in asked] for number in range(len(policies))]
    assert all(one != other for one, other in itertools.combinations(said, 2))


def test_an_engine_for_the_plain_llm_has_no_room_to_compare_in(llama):
    engine = Engine(llama, [], DecodingConfig(max_new_tokens=4), "greedy", 1, 3)
    (request,) = make_requests(1, [3])
    with pytest.raises(ValueError, match="made for a plain policy"):
        engine.admit([replace(request, policy=ValuePolicy(make_critic(llama.config.hidden_size), 0.1))])


@pytest.mark.parametrize("repeats", [False, True])
def test_where_nothing_is_compared_passes_have_one_candidate(llama, repeats, monkeypatch):
    monkeypatch.setattr(engine_module, "repeats_shapes", lambda model: repeats)
    config = DecodingConfig(truncation=TruncationConfig(top_k=5, top_p=1.0), max_new_tokens=8)
    by_value = ValuePolicy(make_critic(llama.config.hidden_size), 0.05)
    engine = Engine(llama, [], config, by_value, 2, 5)
    requests = make_requests(3, [5, 5])
    positions = {}
    for policy in ("greedy", by_value):
        before = engine.num_positions
        assert len(list(engine.generate([replace(request, policy=policy) for request in requests]))) == 2
        positions[policy] = engine.num_positions - before
    assert positions["greedy"] == 2 * (5 + 8)  # both prompts, and each of the tokens once
    assert positions[by_value] > 3 * positions["greedy"]


def test_equal_values_leave_the_likelier_candidate():
    policy = ValuePolicy(make_critic(8), 0.0)
    assert policy.choose([1.0, 1.0, 0.5]) == 0
    assert policy.choose([0.5, 1.0, 1.0]) == 1
    assert ValuePolicy(make_critic(8), 0.5).choose([0.5, 1.0]) == 1
    assert ValuePolicy(make_critic(8), 0.51).choose([0.5, 1.0]) == 0


def test_what_a_candidate_is_worth_is_the_mean_of_both_heads_on_accepting_it():
    critic, states = make_critic(8), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q = critic(states)
    expected = [(float(q[0, row, 1]) + float(q[1, row, 1])) / 2 for row in range(5)]
    assert ValuePolicy(critic, 0.1).values(states) == pytest.approx(expected)


def test_the_settings_say_who_steers():
    agent, critic = make_agent(8), make_critic(8)
    by_value = DecodingConfig(steering="value", min_advantage=0.3)
    found = steered_by(agent, by_value, critic)
    assert isinstance(found, ValuePolicy) and (found.critic, found.min_advantage) == (critic, 0.3)
    gate = GateConfig(max_first_probability=0.8)
    assert steered_by(agent, by_value.model_copy(update={"gate": gate}), critic).gate == gate
    assert not isinstance(steered_by(agent, DecodingConfig(), critic), ValuePolicy)


def test_a_gate_by_the_agents_certainty_is_refused_where_the_agent_does_not_decide():
    with pytest.raises(ValidationError, match="min_confidence=0.9 asks the agent.*use min_advantage"):
        DecodingConfig(steering="value", gate=GateConfig(min_confidence=0.9))


def test_an_engine_is_made_for_the_policy_that_needs_most():
    value, agent = ValuePolicy(make_critic(8), 0.1), AgentPolicy(make_agent(8), 0.5)
    for policies in itertools.permutations(["greedy", value, agent]):
        assert most_demanding(policies) is agent
    assert most_demanding(["greedy", Gated(value, GateConfig())]) == Gated(value, GateConfig())
    assert most_demanding(["greedy", "sample"]) == "greedy"
