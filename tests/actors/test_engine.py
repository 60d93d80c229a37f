"""The engine against a plain sequential loop written from section 3.2 of the paper."""

import copy
import functools
import gc
import itertools
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from mara.actors.config import DecodingConfig, GateConfig, TruncationConfig
from mara.actors.decoding import attention as attention_module
from mara.actors.decoding import engine as engine_module
from mara.actors.decoding import forward as forward_module
from mara.actors.decoding.attention import GROUPED, grouped_attention
from mara.actors.decoding.candidates import truncate
from mara.actors.decoding.engine import Engine
from mara.actors.decoding.forward import Forward
from mara.actors.decoding.generation import Request
from mara.actors.decoding.policies import AgentPolicy, Decisions, Gated
from mara.actors.packing import pack_linears
from mara.common.agent import Agent
from mara.common.config import AgentConfig
from mara.common.cuda_graph import CaptureError
from mara.common.errors import UserError

EOS = 2


class Coin:
    """Accepts with a probability that depends on the state; 1 always, 0 never."""

    def __init__(self, bias: float) -> None:
        self.bias = bias

    def probability(self, states_BD: torch.Tensor) -> torch.Tensor:
        if self.bias in (0.0, 1.0):
            return torch.full((len(states_BD),), self.bias)
        return torch.sigmoid(states_BD.sum(-1).float() + self.bias)

    def decide(self, states_BD: torch.Tensor, uniforms_B: torch.Tensor) -> Decisions:
        accept_B = self.probability(states_BD)
        return Decisions(accept_B > uniforms_B, accept_B.log(), (1 - accept_B).log(), 7)


def sequential(model, config, policy, request, stops=(EOS,), gate=None):
    """Steps 1 to 4 of section 3.2: batch 1, no cache, the whole sequence anew for every candidate.

    Returns tokens, finish reason and (action, rank, candidates, position, forced, reference log-probability,
    log-probabilities of accepting and rejecting, state) rows.
    """
    rng = np.random.default_rng(request.seed)
    tokens, rows = [], []

    @functools.cache  # an accepted candidate's sequence is the next token's
    def run(ids):
        out = model(torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False)
        return out.logits[0, -1:], out.hidden_states[-1][0, -1]

    while len(tokens) < (request.max_new_tokens or config.max_new_tokens):
        logits, before = run((*request.prompt_ids, *tokens))
        found = truncate(logits, config.truncation)
        ids = found.ids_BK[0, : int(found.num_B[0])].tolist()
        chosen = 0
        is_sure = gate is not None and logits[0].softmax(-1).max() > gate.max_first_probability
        if len(ids) > 1 and not is_sure:
            for rank, token in enumerate(ids):
                _, state = run((*request.prompt_ids, *tokens, token))
                forced = config.fallback == "last" and rank == len(ids) - 1
                uniform = torch.tensor([rng.random(dtype=np.float32)])
                said = policy.decide(state[None], uniform)
                accept = bool(said.accept_B[0]) or forced
                if gate is not None and rank == 0:
                    turn = 1 - state @ before / (state.norm() * before.norm())
                    accept |= float(said.reject_logprobs_B[0].exp()) < gate.min_confidence
                    accept |= float(turn) < gate.min_salience
                logprobs = (float(said.accept_logprobs_B[0]), float(said.reject_logprobs_B[0]))
                rows.append(
                    (
                        int(accept),
                        rank,
                        len(ids),
                        len(tokens),
                        forced,
                        float(found.reference_logprobs_BK[0, rank]),
                        (0.0, -np.inf) if forced else logprobs,
                        state,
                    )
                )
                if accept:
                    chosen = rank
                    break
            else:
                _, state = run((*request.prompt_ids, *tokens, ids[0]))
                reference = float(found.reference_logprobs_BK[0, 0])
                rows.append((1, 0, len(ids), len(tokens), True, reference, (0.0, -np.inf), state))
        tokens.append(ids[chosen])
        if tokens[-1] in stops:
            return tokens, "eos", rows
    return tokens, "length", rows


def make_requests(seed, lengths):
    rng = np.random.default_rng(seed)
    return [
        Request(rng.integers(3, 61, size=length).tolist(), seed=seed * 1000 + index, tag=index)
        for index, length in enumerate(lengths)
    ]


FLOAT32_NORMS = ("gemma2", "gemma3")
"""Families whose norms compute in float32 whatever the dtype."""


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen2_mixed",
        "qwen3",
        "gemma2",
        "gemma3",
        "gpt2",
        "gpt_neox",
        "granite",
        "cohere",
    ],
)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model_seed=st.integers(0, 2),
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    rows=st.integers(1, 5),
    top_k=st.integers(1, 9),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    limit=st.integers(1, 9),
    own_limit=st.integers(1, 9),
    stops=st.sampled_from([(EOS,), (EOS, 17, 40), ()]),
    bias=st.sampled_from([0.0, 1.0, 0.5, -1.0]),
    fallback=st.sampled_from(["last", "first"]),
    shared=st.integers(0, 4),
)
def test_the_engine_equals_the_sequential_procedure(
    make_model,
    family,
    model_seed,
    seed,
    lengths,
    rows,
    top_k,
    top_p,
    limit,
    own_limit,
    stops,
    bias,
    fallback,
    shared,
):
    model = make_model(family, model_seed)
    tolerance = 1e-5 if family in FLOAT32_NORMS else 1e-9
    truncation = TruncationConfig(top_k=top_k, top_p=top_p)
    config = DecodingConfig(truncation=truncation, max_new_tokens=limit, fallback=fallback)
    requests = make_requests(seed, lengths)
    # One prompt has a limit of its own, and begins otherwise than those that share a beginning.
    prefix = requests[-1].prompt_ids[:shared]
    requests = [replace(request, prompt_ids=prefix + request.prompt_ids) for request in requests[:-1]] + [
        replace(requests[-1], max_new_tokens=min(limit, own_limit))
    ]
    expected = [sequential(model, config, Coin(bias), request, stops) for request in requests]
    modes = [("lazy", 3), ("wide", 1), ("wide", 2), ("wide", 4), ("wide", 8), ("auto", 3)]
    for mode, window in modes:
        in_mode = config.model_copy(update={"mode": mode, "window": window})
        longest = max(len(request.prompt_ids) for request in requests)
        engine = Engine(model, stops, in_mode, Coin(bias), rows, longest, prefix)
        answers = {generation.request.tag: generation for generation in engine.generate(requests)}
        assert sorted(answers) == list(range(len(requests)))
        for request, (tokens, reason, decisions) in zip(requests, expected, strict=True):
            found = answers[request.tag]
            assert found.response_ids == tokens, (mode, window)
            assert found.finish_reason == reason
            assert [(d.action, d.rank, d.num_candidates, d.position, d.forced) for d in found.decisions] == [
                decision[:5] for decision in decisions
            ]
            assert {decision.policy_version for decision in found.decisions} <= {7}
            for decision, (*_, reference, logprobs, state) in zip(found.decisions, decisions, strict=True):
                assert decision.reference_logprob == pytest.approx(reference, abs=1e-5)
                # As probabilities: where one is nearly 1, the logarithm of the other is mostly rounding.
                found_B2 = np.exp([decision.accept_logprob, decision.reject_logprob])
                assert found_B2 == pytest.approx(np.exp(logprobs), abs=1e-5)
                torch.testing.assert_close(decision.state_D, state, atol=tolerance, rtol=1e-7)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    top_k=st.integers(1, 6),
    bias=st.sampled_from([0.0, 0.5, -1.0]),
    fallback=st.sampled_from(["last", "first"]),
    # Near the values of a random LLM, so that a gate is open at some positions and closed at others.
    gate=st.builds(
        GateConfig,
        max_first_probability=st.sampled_from([0.03, 0.05, 1.0]),
        min_confidence=st.sampled_from([0.0, 0.4, 0.7]),
        min_salience=st.sampled_from([0.0, 0.95, 1.1]),
    ),
)
def test_a_gate_equals_the_sequential_procedure_that_has_it(
    llama, seed, lengths, top_k, bias, fallback, gate
):
    config = DecodingConfig(truncation=TruncationConfig(top_k=top_k), max_new_tokens=6, fallback=fallback)
    # Rows with and without a gate side by side, of one policy.
    coin = Coin(bias)
    requests = [
        replace(request, policy=Gated(coin, gate) if request.tag % 2 == 0 else coin)
        for request in make_requests(seed, lengths)
    ]
    expected = [
        sequential(llama, config, coin, request, gate=gate if request.tag % 2 == 0 else None)
        for request in requests
    ]
    for mode in ("lazy", "wide"):
        engine = Engine(llama, [EOS], config.model_copy(update={"mode": mode}), coin, 3, 9)
        answers = {generation.request.tag: generation for generation in engine.generate(requests)}
        for request, (tokens, reason, decisions) in zip(requests, expected, strict=True):
            found = answers[request.tag]
            assert (found.response_ids, found.finish_reason) == (tokens, reason)
            assert [(d.action, d.rank, d.num_candidates, d.position, d.forced) for d in found.decisions] == [
                decision[:5] for decision in decisions
            ]


def test_always_accepting_is_greedy_generation(llama):
    requests = make_requests(3, [4, 9, 6])
    config = DecodingConfig(truncation=TruncationConfig(top_k=5), max_new_tokens=12)
    engine = Engine(llama, [EOS], config, Coin(1.0), 2, 9)
    for generation in engine.generate(requests):
        prompt = torch.tensor([generation.request.prompt_ids])
        expected = llama.generate(prompt, do_sample=False, max_new_tokens=12, pad_token_id=0)[
            0, prompt.shape[1] :
        ]
        assert generation.response_ids == expected.tolist()


def test_the_plain_greedy_llm_needs_one_pass_a_token_and_takes_no_decision(llama):
    (request,) = make_requests(5, [6])
    config = DecodingConfig(truncation=TruncationConfig(top_k=5), max_new_tokens=10)
    engine = Engine(llama, [], config, "greedy", 1, 6)
    (generation,) = engine.generate([request])
    assert engine.num_passes == 1 + 10
    assert generation.decisions == []


def test_sampling_the_plain_llm_follows_the_candidate_distribution(llama):
    prompt = make_requests(1, [5])[0].prompt_ids
    config = DecodingConfig(truncation=TruncationConfig(top_k=4, top_p=1.0), max_new_tokens=1)
    engine = Engine(llama, [], config, "sample", 64, 5)
    drawn = [g.response_ids[0] for g in engine.generate(Request(prompt, seed=seed) for seed in range(2000))]
    logits = llama(torch.tensor([prompt])).logits[0, -1].float()
    top = logits.topk(4)
    for token, probability in zip(top.indices.tolist(), torch.softmax(top.values, -1).tolist(), strict=True):
        assert drawn.count(token) / 2000 == pytest.approx(probability, abs=0.05)


def test_an_answer_does_not_depend_on_its_neighbours(llama):
    requests = make_requests(11, [3, 8, 5, 10, 2, 7])
    config = DecodingConfig(truncation=TruncationConfig(top_k=6), max_new_tokens=8)
    alone = {}
    for request in requests:
        (generation,) = Engine(llama, [EOS], config, Coin(0.5), 1, 10).generate([request])
        alone[request.tag] = generation.response_ids
    for order in itertools.islice(itertools.permutations(requests), 0, 720, 119):
        together = Engine(llama, [EOS], config, Coin(0.5), 4, 10).generate(order)
        assert {g.request.tag: g.response_ids for g in together} == alone


def test_equal_prompts_run_through_the_llm_once_and_answer_as_if_alone(llama):
    one, two = make_requests(13, [6, 9])
    requests = [
        Request(source.prompt_ids, seed=number, tag=number)
        for number, source in enumerate([one, two, one, one, two, one])
    ]
    config = DecodingConfig(truncation=TruncationConfig(top_k=6), max_new_tokens=8)
    engine = Engine(llama, [EOS], config, Coin(0.5), 6, 9)
    engine.admit(requests)
    assert engine.num_positions == 2 * 9
    together = {generation.request.tag: generation.response_ids for generation in engine.generate([])}
    for request in requests:
        (alone,) = Engine(llama, [EOS], config, Coin(0.5), 1, 9).generate([request])
        assert together[request.tag] == alone.response_ids


def test_log_probabilities_of_tokens_are_those_of_the_llm(llama):
    (request,) = make_requests(2, [7])
    config = DecodingConfig(truncation=TruncationConfig(top_k=5), max_new_tokens=9)
    (generation,) = Engine(llama, [EOS], config, Coin(0.5), 1, 7).generate([request])
    ids = torch.tensor([request.prompt_ids + generation.response_ids])
    logprobs = torch.log_softmax(llama(ids).logits[0].float(), -1)
    expected = [float(logprobs[6 + i, token]) for i, token in enumerate(generation.response_ids)]
    assert generation.token_logprobs == pytest.approx(expected, abs=1e-5)
    assert len(generation.token_states) == len(generation.response_ids)


def test_eager_attention_gives_the_same_answers_as_sdpa(llama, eager_llama):
    requests = make_requests(4, [5, 9])
    config = DecodingConfig(truncation=TruncationConfig(top_k=5), max_new_tokens=8)
    answers = [
        {
            g.request.tag: g.response_ids
            for g in Engine(model, [EOS], config, Coin(0.5), 2, 9).generate(requests)
        }
        for model in (llama, eager_llama)
    ]
    assert answers[0] == answers[1]


def test_new_weights_count_from_the_next_decision_and_are_recorded(llama):
    agent = Agent(32, AgentConfig(widths=(8, 8), accept_bias=1.0)).eval()
    policy = AgentPolicy(agent, threshold=None, version=3)
    (request,) = make_requests(6, [4])
    config = DecodingConfig(truncation=TruncationConfig(top_k=6, top_p=1.0), max_new_tokens=6)
    engine = Engine(llama, [], config, policy, 1, 4)
    engine.admit([request])
    engine.step()
    policy.version = 4
    finished = []
    while not finished:
        finished = engine.step()
    versions = [decision.policy_version for decision in finished[0].decisions]
    assert versions == [3] + [4] * (len(versions) - 1)


def test_the_last_candidate_is_forced_and_the_policy_has_no_say(llama):
    (request,) = make_requests(8, [4])
    config = DecodingConfig(truncation=TruncationConfig(top_k=3, top_p=1.0), max_new_tokens=4)
    (generation,) = Engine(llama, [], config, Coin(0.0), 1, 4).generate([request])
    assert [d.rank for d in generation.decisions] == [0, 1, 2] * 4
    assert [d.forced for d in generation.decisions] == [False, False, True] * 4
    assert all(
        d.accept_logprob == 0.0 and d.reject_logprob == -np.inf for d in generation.decisions if d.forced
    )


def test_a_first_candidate_that_is_retaken_is_a_forced_decision_and_the_last_one_is_free(llama):
    agent = Agent(32, AgentConfig(widths=(8, 8), accept_bias=-1.0)).eval()
    policy = AgentPolicy(agent, threshold=0.9, version=5)
    (request,) = make_requests(8, [4])
    config = DecodingConfig(
        truncation=TruncationConfig(top_k=3, top_p=1.0), max_new_tokens=4, fallback="first"
    )
    (generation,) = Engine(llama, [], config, policy, 1, 4).generate([request])
    assert [d.rank for d in generation.decisions] == [0, 1, 2, 0] * 4
    assert [d.forced for d in generation.decisions] == [False, False, False, True] * 4
    assert [d.action for d in generation.decisions] == [0, 0, 0, 1] * 4
    for asked, retaken in zip(generation.decisions[::4], generation.decisions[3::4], strict=True):
        assert (retaken.accept_logprob, retaken.reject_logprob) == (0.0, -np.inf)
        assert (retaken.position, retaken.num_candidates) == (asked.position, 3)
        assert retaken.reference_logprob == asked.reference_logprob
        assert retaken.policy_version == 5
        torch.testing.assert_close(retaken.state_D, asked.state_D)


def test_greedy_decisions_use_the_threshold():
    agent = Agent(8, AgentConfig(widths=(4, 4), accept_bias=0.5)).eval()
    states = torch.zeros(1, 8)
    probability = float(agent(states)[0, 1].detach().exp())
    draws = torch.zeros(1)
    assert bool(AgentPolicy(agent, threshold=probability - 0.01).decide(states, draws).accept_B[0])
    assert not bool(AgentPolicy(agent, threshold=probability + 0.01).decide(states, draws).accept_B[0])


def test_too_many_or_too_long_prompts_are_refused(llama):
    config = DecodingConfig(max_new_tokens=4)
    engine = Engine(llama, [EOS], config, "greedy", 1, 4)
    with pytest.raises(ValueError, match="2 requests for 1 free rows"):
        engine.admit(make_requests(0, [2, 2]))
    with pytest.raises(ValueError, match="within 1 and 4"):
        engine.admit(make_requests(0, [5]))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_position_embeddings": 20}, "llama has 20 positions, prompt and answer may have 24"),
        ({"_attn_implementation": "flash_attention_2"}, "'flash_attention_2' attention, which takes no 4-D"),
        ({"layer_types": ["full_attention", "linear_attention"]}, r"layers of the kind .*linear_attention"),
        ({"logits_scaling": 4.0}, r"llama has logits_scaling=4\.0, and what that does"),
    ],
)
def test_a_model_that_would_be_silently_wrong_is_refused_by_name(llama, settings, says):
    model = copy.deepcopy(llama)
    for name, value in settings.items():
        setattr(model.config, name, value)
    with pytest.raises(UserError, match=says) as caught:
        Engine(model, [EOS], DecodingConfig(max_new_tokens=20), "greedy", 1, 4)
    assert str(caught.value).startswith("llm.model: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
def test_heads_that_share_keys_attend_as_with_copies_of_them(num_tokens, additive):
    draws = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(2, heads, length, size, generator=draws, dtype=torch.float64)
        for heads, length, size in ((6, num_tokens, 8), (2, 9, 8), (2, 9, 4))
    )
    mask = torch.rand(2, 1, num_tokens, 9, generator=draws) < 0.5
    mask[..., 0] = True
    if additive:
        mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    copied = [part.repeat_interleave(3, dim=1) for part in (key, value)]
    weights = (query @ copied[0].mT * 0.3).masked_fill(~mask if not additive else mask < 0, -torch.inf)
    torch.testing.assert_close(found, (weights.softmax(-1) @ copied[1]).transpose(1, 2))


def test_a_pass_of_many_tokens_repeats_keys_and_not_the_mask(monkeypatch):
    query, key = torch.randn(1, 4, 33, 8), torch.randn(1, 2, 40, 8)
    repeated = []
    monkeypatch.setattr(
        attention_module, "sdpa_attention_forward", lambda *args, **kwargs: (repeated.append(1), None)
    )
    grouped_attention(torch.nn.Module(), query, key, key, torch.ones(1, 1, 33, 40, dtype=torch.bool))
    assert repeated
    grouped_attention(torch.nn.Module(), query[:, :, :32], key, key, torch.ones(1, 1, 32, 40).bool())
    assert len(repeated) == 1


def test_a_model_that_grouped_attention_is_wrong_for_attends_as_transformers_has_it(llama, monkeypatch):
    def wrong(module, query, key, value, mask, *args, **kwargs):
        found, _ = grouped_attention(module, query, key, value, mask, *args, **kwargs)
        return found if mask is None else torch.zeros_like(found), None

    model = copy.deepcopy(llama)
    monkeypatch.setitem(AttentionInterface._global_mapping, GROUPED, wrong)
    engine = Engine(model, [EOS], DecodingConfig(max_new_tokens=4, mode="wide"), Coin(0.3), 2, 4)
    assert model.config._attn_implementation == "sdpa"
    (request,) = make_requests(21, [4])
    (generation,) = engine.generate([request])
    assert generation.response_ids == sequential(llama, engine.config, Coin(0.3), request)[0]


@pytest.mark.parametrize("repeats", [False, True])
def test_the_cache_goes_with_its_engine(llama, monkeypatch, repeats):
    """At once: the next engine's is allocated before Python looks for circles."""
    monkeypatch.setattr(engine_module, "repeats_shapes", lambda model: repeats)
    engine = Engine(llama, [EOS], DecodingConfig(max_new_tokens=4), Coin(0.3), 2, 4)
    list(engine.generate(make_requests(21, [4, 3])))
    cache = weakref.ref(engine._cache)
    gc.disable()
    try:
        del engine
        assert cache() is None
    finally:
        gc.enable()


def test_the_engine_reads_keys_without_copies(llama, monkeypatch):
    def copied(*args):
        raise AssertionError("keys were repeated")

    model = copy.deepcopy(llama)
    engine = Engine(model, [EOS], DecodingConfig(max_new_tokens=4, mode="wide"), Coin(0.3), 2, 4)
    monkeypatch.setattr("transformers.integrations.sdpa_attention.repeat_kv", copied)
    assert len(list(engine.generate(make_requests(21, [4, 3])))) == 2


def check_same_answers(answers, others):
    assert answers.keys() == others.keys()
    for tag, answer in answers.items():
        assert others[tag].response_ids == answer.response_ids
        for one, other in zip(answer.decisions, others[tag].decisions, strict=True):
            assert (one.rank, one.action) == (other.rank, other.action)
            torch.testing.assert_close(one.state_D, other.state_D, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("mode", ["lazy", "wide"])
def test_passes_with_fixed_shapes_give_the_same_answers(make_model, mode, monkeypatch):
    """The traced graph must have no break: on a GPU it becomes one CUDA graph."""
    monkeypatch.setattr(engine_module, "COMPILER", "aot_eager")
    model = make_model("qwen2_mixed", 1)
    requests = make_requests(21, [4, 9, 6, 11, 3])
    config = DecodingConfig(truncation=TruncationConfig(top_k=6), max_new_tokens=10, mode=mode)
    answers = []
    for compiled in (False, True):
        in_mode = config.model_copy(update={"compile": compiled})
        engine = Engine(model, [EOS], in_mode, Coin(0.3), 3, 11)
        answers.append({g.request.tag: g for g in engine.generate(requests)})
    check_same_answers(*answers)


@pytest.mark.parametrize(
    ("mode", "widths"),
    [("lazy", {1}), ("wide", {3, 6}), ("auto", {1, 2, 4, 6})],
    ids=lambda value: str(value),
)
def test_passes_of_few_shapes_as_on_a_gpu_give_the_same_answers(make_model, mode, widths, monkeypatch):
    shapes = set()
    fixed = Forward.fixed

    def seen(self, tokens, span):
        shapes.add(tuple(tokens.ids_BQ.shape))
        return fixed(self, tokens, span)

    monkeypatch.setattr(Forward, "fixed", seen)
    model = make_model("qwen2_mixed", 1)
    requests = make_requests(21, [4, 9, 6, 11, 3, 5, 8, 7, 4, 10, 6])
    config = DecodingConfig(truncation=TruncationConfig(top_k=6), max_new_tokens=10, mode=mode)
    answers = []
    for repeats in (False, True):
        monkeypatch.setattr(engine_module, "repeats_shapes", lambda model, repeats=repeats: repeats)
        engine = Engine(model, [EOS], config, Coin(0.3), 8, 11)
        answers.append({g.request.tag: g for g in engine.generate(requests)})
    check_same_answers(*answers)
    # All rows or a quarter of them, and a few widths.
    assert {rows for rows, _ in shapes} == {8, 2}
    assert {width for _, width in shapes} <= widths


def test_a_model_that_no_graph_can_hold_runs_without_and_says_so_once(llama, monkeypatch, caplog):
    def cannot(work, device, memory):
        work()
        raise CaptureError("operation not permitted when stream is capturing")

    monkeypatch.setattr(engine_module, "repeats_shapes", lambda model: True)
    monkeypatch.setattr(forward_module, "capture", cannot)
    config = DecodingConfig(truncation=TruncationConfig(top_k=5), max_new_tokens=6, mode="wide")
    engine = Engine(llama, [], config, Coin(0.3), 8, 9)
    engine._forward._graph_memory = object()  # as on a GPU
    requests = make_requests(21, [4, 9, 6])
    answers = {g.request.tag: g.response_ids for g in engine.generate(requests)}
    assert answers == {r.tag: sequential(llama, config, Coin(0.3), r, stops=())[0] for r in requests}
    assert [record.getMessage() for record in caplog.records] == [
        "the LLM runs kernel by kernel, more slowly: no CUDA graph can be made of a pass "
        "(operation not permitted when stream is capturing)"
    ]


def test_wide_decoding_needs_one_pass_where_lazy_decoding_needs_one_for_each_rejection(llama):
    (request,) = make_requests(8, [4])
    config = DecodingConfig(truncation=TruncationConfig(top_k=3, top_p=1.0), max_new_tokens=4)
    passes = {}
    for mode in ("lazy", "wide"):
        engine = Engine(llama, [], config.model_copy(update={"mode": mode}), Coin(0.0), 1, 4)
        list(engine.generate([request]))
        passes[mode] = engine.num_passes
    assert passes == {"lazy": 1 + 4 * 3, "wide": 1 + 4}


def test_a_row_that_rejects_its_window_examines_twice_as_many(llama):
    (request,) = make_requests(8, [4])
    config = DecodingConfig(
        truncation=TruncationConfig(top_k=7, top_p=1.0), max_new_tokens=1, mode="wide", window=1
    )
    engine = Engine(llama, [], config, Coin(0.0), 1, 4)
    list(engine.generate([request]))
    assert engine.num_passes == 1 + 3  # one, two, four candidates
    assert engine.num_positions == 4 + 1 + 2 + 4


def test_what_all_prompts_begin_with_is_read_once(llama):
    one, two, three = ([5, 6, 7, *tail] for tail in ([8, 9], [10], [11, 12, 13]))
    config = DecodingConfig(truncation=TruncationConfig(top_k=5), max_new_tokens=1)
    engine = Engine(llama, [], config, "greedy", 3, 6, [5, 6, 7])
    engine.admit([Request(one), Request(two)])
    assert engine.num_positions == 3 + 2 * 2
    engine.admit([Request(three)])
    assert engine.num_positions == 3 + 2 * 2 + 3


def test_a_limit_above_that_of_the_engine_is_refused(llama):
    engine = Engine(llama, [EOS], DecodingConfig(max_new_tokens=4), "greedy", 1, 4)
    with pytest.raises(ValueError, match="max_new_tokens must be within 1 and 4"):
        engine.admit([Request([3, 4], max_new_tokens=5)])


def test_a_cache_too_large_for_the_memory_is_refused_with_its_size(llama):
    with pytest.raises(UserError, match=r"rollout\.rows: 1000000000 rows of 8 tokens take .* GiB"):
        Engine(llama, [EOS], DecodingConfig(max_new_tokens=4), "greedy", 10**9, 4)


def test_the_tuner_learns_which_ranks_the_engine_took(llama, monkeypatch):
    told = []
    monkeypatch.setattr(engine_module.WindowTuner, "taken", lambda self, ranks: told.extend(ranks))
    requests = make_requests(9, [4, 7, 5])
    config = DecodingConfig(truncation=TruncationConfig(top_k=6, top_p=1.0), max_new_tokens=6)
    engine = Engine(llama, [], config, Coin(0.3), 2, 7)
    taken = [d.rank for g in engine.generate(requests) for d in g.decisions if d.action]
    assert sorted(told) == sorted(taken)


@pytest.mark.parametrize("mode", ["lazy", "wide"])
def test_a_fallback_record_keeps_a_state_of_its_own(llama, mode):
    """With CUDA graphs the pass that it was taken from is overwritten by the next one."""
    (request,) = make_requests(8, [4])
    config = DecodingConfig(
        truncation=TruncationConfig(top_k=3, top_p=1.0), max_new_tokens=2, fallback="first", mode=mode
    )
    (generation,) = Engine(llama, [], config, Coin(0.0), 1, 4).generate([request])
    (first, second) = [d.state_D for d in generation.decisions if d.action]
    assert first.untyped_storage().nbytes() == second.untyped_storage().nbytes() == 32 * 8


def test_packed_layers_are_not_compiled(llama):
    model = copy.deepcopy(llama).float()
    pack_linears(model)
    with pytest.raises(ValueError, match="pack=False"):
        Engine(model, [EOS], DecodingConfig(max_new_tokens=4, compile=True), "greedy", 1, 4)
