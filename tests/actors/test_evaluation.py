"""Preference rates, fluency, and a whole evaluation of a tiny LLM against numbers computed anew."""

from __future__ import annotations

import gc
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mara.actors.calibration import choose_gate, is_proved, try_ways
from mara.actors.config import DecodingConfig, GateConfig, LLMConfig, TruncationConfig
from mara.actors.decoding.engine import Engine
from mara.actors.decoding.generation import Generation, Request
from mara.actors.decoding.policies import AgentPolicy, Plain, Policy, steered_by
from mara.actors.evaluation import (
    EvaluationReport,
    ScoredAnswer,
    answer_prompts,
    evaluate,
    fluency,
    preference_rate,
)
from mara.actors.head_config import HeadShape
from mara.actors.heads import RewardHead
from mara.actors.llm import LLM, load_llm
from mara.actors.prompts import Prompt
from mara.common.agent import Agent
from mara.common.config import AgentConfig
from mara.common.critic import TwinCritic
from mara.common.errors import UserError
from mara.common.seeding import derive_seed


def test_an_interval_of_few_prompts_is_not_shown() -> None:
    few, enough = preference_rate([np.ones(19)]), preference_rate([np.array([1.0] * 19 + [-1.0])])
    assert few.interval() == "too few prompts"
    assert enough.interval() == f"{enough.low:+.1%} to {enough.high:+.1%}"
    assert preference_rate([np.zeros(200)]).interval() == "all tie"


def test_the_rate_is_wins_less_losses_over_all():
    rate = preference_rate([np.array([1.0, 2.0, -1.0, 0.0, 3.0])])
    assert (rate.wins, rate.ties, rate.losses) == (3, 1, 1)
    assert rate.rate == pytest.approx(0.4)


def test_a_joint_win_needs_every_judge_and_equals_the_mean_of_the_rates():
    rng = np.random.default_rng(0)
    helpful, harmless = rng.normal(0.3, 1, 500), rng.normal(0.1, 1, 500)
    joint = preference_rate([helpful, harmless])
    alone = [preference_rate([values]).rate for values in (helpful, harmless)]
    assert joint.rate == pytest.approx(np.mean(alone))
    assert joint.wins == int(((helpful > 0) & (harmless > 0)).sum())


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        rate = preference_rate([rng.choice([-1.0, 1.0], p=[0.4, 0.6], size=100)], seed=trial)
        covered += rate.low <= 0.2 <= rate.high
    assert 0.88 <= covered / 200 <= 0.99


def answer(logprobs, reason="length"):
    return ScoredAnswer([0] * len(logprobs), list(logprobs), reason, {}, [], 0, 0)


def test_fluency_counts_as_its_names_say():
    found = fluency([answer(np.log([0.5, 0.25])), answer(np.log([0.5]), "eos")], ["a b a b", "A c"])
    assert found.perplexity == pytest.approx((2 * 4 * 2) ** (1 / 3))
    assert found.distinct_1 == pytest.approx(3 / 6)
    assert found.distinct_2 == pytest.approx(3 / 4)
    assert found.distinct_3 == pytest.approx(2 / 2)
    assert found.mean_tokens == pytest.approx(1.5)
    assert found.eos_share == pytest.approx(0.5)


def test_settings_of_the_decoder_have_the_papers_defaults():
    config = DecodingConfig()
    assert config.truncation == TruncationConfig(top_k=40, top_p=0.95, temperature=0.8)
    assert config.max_new_tokens == 512
    assert config.fallback == "last"
    assert torch.isfinite(torch.tensor(config.threshold))


def test_sets_larger_than_a_rank_can_number_are_refused():
    assert TruncationConfig(top_k=1024).top_k == 1024
    with pytest.raises(ValidationError, match="top_k"):
        TruncationConfig(top_k=1025)


DECODING = DecodingConfig(max_new_tokens=4, truncation=TruncationConfig(top_k=4, top_p=0.97), threshold=0.4)
TEXTS = ["why", "how so", "what", "when is it", "who", "a", "b c", "dd", "e e e", "no"]
PROMPTS = [Prompt(f"p{n}", text) for n, text in enumerate(TEXTS)]
WEIGHTS = {"helpful": 1.5, "cost": -0.5, "unused": 0.0}


def make_head(seed: int) -> RewardHead:
    head = RewardHead(HeadShape(hidden_size=32, width=8)).requires_grad_(False)
    draws = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        parameter.normal_(generator=draws)
    return head.eval()


def make_agent(seed: int = 5, bias: float = -0.2) -> Agent:
    """Rejects now and then, depending on the state."""
    torch.manual_seed(seed)
    agent = Agent(32, AgentConfig(widths=(16, 8), accept_bias=bias)).eval().requires_grad_(False)
    torch.nn.init.normal_(agent.output_linear.weight, std=1.5)
    return agent


@pytest.fixture(scope="module")
def llm(llm_folder) -> LLM:
    return load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu"))


HEADS = {name: make_head(seed) for seed, name in enumerate(WEIGHTS)}


def run(
    llm: LLM, decoding: DecodingConfig = DECODING, rows: int = 4, prompts: list[Prompt] = PROMPTS, **settings
) -> EvaluationReport:
    return evaluate(
        llm,
        steered_by(make_agent(), decoding),
        prompts,
        HEADS,
        WEIGHTS,
        decoding,
        rows=rows,
        max_prompt_tokens=40,
        seed=3,
        **settings,
    )


def answers_alone(llm: LLM, decoding: DecodingConfig, policy) -> list[Generation]:
    """Every prompt answered by itself."""
    found = []
    for prompt in PROMPTS:
        ids = llm.render(prompt.prompt)
        engine = Engine(llm.model, llm.eos_ids, decoding, policy, 1, len(ids))
        found += engine.generate([Request(ids, derive_seed(3, "answer", prompt.id))])
    return found


def read_anew(llm: LLM, generation: Generation) -> tuple[dict[str, float], float]:
    """Scores by head of the answer's text, and the log-likelihood of its tokens, by plain forward passes."""
    prompt, response = generation.request.prompt_ids, generation.response_ids
    (states_LD,) = llm.hidden_states([prompt + response])
    words = len(response) - (response[-1] in llm.eos_ids)
    states_ND = states_LD[len(prompt) : len(prompt) + words]
    scores = {name: float(head.score_states([states_ND])[0]) for name, head in HEADS.items()}
    logits_LV = llm.model(torch.tensor([prompt + response])).logits[0].float()
    logprobs_LV = torch.log_softmax(logits_LV, -1)[len(prompt) - 1 : -1]
    return scores, float(logprobs_LV.gather(1, torch.tensor(response)[:, None]).sum())


def outcome(better: list[bool], worse: list[bool]) -> int:
    return 1 if all(better) else -1 if all(worse) else 0


@pytest.mark.parametrize("fallback", ["last", "first"])
def test_a_report_has_the_numbers_that_its_answers_have(llm, fallback):
    decoding = DECODING.model_copy(update={"fallback": fallback})
    report = run(llm, decoding)
    policies = {"base": "greedy", "agent": AgentPolicy(make_agent(), threshold=0.4), "base_sampled": "sample"}
    answers = {system: answers_alone(llm, decoding, policy) for system, policy in policies.items()}
    anew = {system: [read_anew(llm, one) for one in of_system] for system, of_system in answers.items()}

    assert report.num_prompts == len(PROMPTS)
    for system, of_system in answers.items():
        num_tokens = sum(len(one.response_ids) for one in of_system)
        perplexity = np.exp(-sum(total for _, total in anew[system]) / num_tokens)
        found = report.fluency[system]
        assert found.perplexity == pytest.approx(perplexity, rel=1e-4)
        assert found.mean_tokens == pytest.approx(num_tokens / len(PROMPTS))
        ended = [one.response_ids[-1] == llm.eos_ids[0] for one in of_system]
        assert found.eos_share == pytest.approx(np.mean(ended))
        for name in HEADS:
            mean = np.mean([scores[name] for scores, _ in anew[system]])
            assert report.mean_scores[system][name] == pytest.approx(mean, abs=1e-4)

    outcomes: dict[str, list[int]] = {"helpful": [], "cost": [], "joint": []}
    for base, agent, (base_scores, _), (agent_scores, _) in zip(
        answers["base"], answers["agent"], anew["base"], anew["agent"], strict=True
    ):
        same = base.response_ids == agent.response_ids
        higher = not same and agent_scores["helpful"] > base_scores["helpful"]
        lower = not same and agent_scores["helpful"] < base_scores["helpful"]
        cheaper = not same and agent_scores["cost"] < base_scores["cost"]
        dearer = not same and agent_scores["cost"] > base_scores["cost"]
        outcomes["helpful"].append(outcome([higher], [lower]))
        outcomes["cost"].append(outcome([cheaper], [dearer]))
        outcomes["joint"].append(outcome([higher, cheaper], [lower, dearer]))
    assert report.preference.keys() == outcomes.keys()
    for name, each in outcomes.items():
        rate = report.preference[name]
        assert (rate.wins, rate.ties, rate.losses) == (each.count(1), each.count(0), each.count(-1)), name
        assert rate.rate == pytest.approx(np.mean(each))
        assert rate.low <= rate.rate <= rate.high
    # The example would notice a cost that is taken for a reward, and has a tie.
    assert outcomes["cost"].count(1) != outcomes["cost"].count(-1)
    assert 0 in outcomes["helpful"]

    decisions = [decision for one in answers["agent"] for decision in one.decisions]
    taken = [decision for decision in decisions if decision.action == 1]
    places = [sum(decision.rank == rank for decision in taken) / len(taken) for rank in range(5)]
    assert report.accepted_ranks == pytest.approx([*places, 0.0])
    forced = sum(decision.forced for decision in taken)
    assert forced > 0
    assert report.forced_share == pytest.approx(forced / len(taken))
    num_tokens = sum(len(one.response_ids) for one in answers["agent"])
    assert report.decisions_per_token == pytest.approx(len(decisions) / num_tokens)
    changed = sum(decision.rank > 0 for decision in taken)
    assert 0 < changed < num_tokens and report.interventions == pytest.approx(changed / num_tokens)

    assert [Prompt(sample.id, sample.prompt, sample.category) for sample in report.samples] == PROMPTS
    for index, sample in enumerate(report.samples):
        for system in ("base", "agent"):
            assert sample.answers[system] == llm.decode(answers[system][index].response_ids)
            assert sample.scores[system] == pytest.approx(anew[system][index][0], abs=1e-4)
        same = answers["base"][index].response_ids == answers["agent"][index].response_ids
        assert (
            sample.outcome
            == {1: "better", -1: "worse", 0: "same" if same else "mixed"}[outcomes["joint"][index]]
        )


def test_samples_say_who_won_as_the_joint_rate_counts_it(llm):
    report = run(llm)
    told = [sample.outcome for sample in report.samples]
    joint = report.preference["joint"]
    assert (told.count("better"), told.count("worse")) == (joint.wins, joint.losses)
    for sample in report.samples:
        same = sample.answers["base"] == sample.answers["agent"]
        assert (sample.outcome == "same") == same
    assert {"same", "mixed"} <= set(told) and {"better", "worse"} & set(told)


def test_the_rates_of_a_category_are_those_of_its_prompts(llm):
    categories = ["b", "a", "", "b", "a", "b", "", "b", "a", "b"]
    prompts = [replace(prompt, category=name) for prompt, name in zip(PROMPTS, categories, strict=True)]
    report = run(llm, prompts=prompts)
    assert list(report.categories) == ["a", "b"]
    for name, group in report.categories.items():
        told = [sample.outcome for sample in report.samples if sample.category == name]
        joint = group.preference["joint"]
        assert group.num_prompts == len(told) == categories.count(name)
        assert (joint.wins, joint.losses) == (told.count("better"), told.count("worse"))
        assert group.preference.keys() == report.preference.keys()
    # The example would notice rates of all prompts, or of the other category.
    rates = [group.preference["helpful"].rate for group in (report, *report.categories.values())]
    assert len(set(rates)) == 3


class Jitter(RewardHead):
    """Scores every answer a little higher than the one before, as if it were rounded differently."""

    def score_prefixes(self, states_ND: torch.Tensor) -> torch.Tensor:
        self.base_mean -= 1e-5
        return super().score_prefixes(states_ND)


def test_answers_of_the_same_tokens_are_ties_however_their_scores_were_rounded(llm):
    prompts = [Prompt(f"{n} {text}", text * (n + 1)) for n in range(3) for text in TEXTS]
    agent = make_agent(seed=2, bias=0.0)
    policy = AgentPolicy(agent, threshold=0.4)
    answers = answer_prompts(llm, prompts, DECODING, {"base": "greedy", "agent": policy}, 7, 60)
    pairs = zip(answers["base"], answers["agent"], strict=True)
    num_same = sum(base.response_ids == guided.response_ids for base, guided in pairs)
    assert 0 < num_same < len(prompts)
    heads = {name: Jitter(HeadShape(hidden_size=32, width=0)) for name in WEIGHTS}
    report = evaluate(llm, policy, prompts, heads, WEIGHTS, DECODING, rows=7, max_prompt_tokens=60)
    for name, rate in report.preference.items():
        assert rate.ties == (num_same if name != "joint" else len(prompts))
    for sample in report.samples:
        assert (sample.scores["base"] == sample.scores["agent"]) == (sample.outcome == "same")


def test_a_score_that_is_no_number_is_never_a_tie(llm):
    head = make_head(0)
    head.base_std.fill_(0.0)
    with pytest.raises(UserError, match=r"rewards\.cost\.path: .* prompt 'p\d' the score (nan|-?inf);"):
        answer_prompts(llm, PROMPTS, DECODING, {"base": "greedy"}, 3, 40, heads=HEADS | {"cost": head})


def test_no_more_answers_with_hidden_states_are_held_than_there_are_rows(llm):
    alive: list[int] = []

    def progress(done: int, total: int) -> None:
        alive.append(sum(type(thing) is Generation for thing in gc.get_objects()))

    gc.collect()
    gc.freeze()  # What there was before is not listed.
    try:
        run(llm, rows=3, progress=progress)
    finally:
        gc.unfreeze()
    assert len(alive) == 1 + 3 * len(PROMPTS)  # The first says that none was made yet.
    assert 1 <= max(alive) <= 3
    scored = answer_prompts(llm, PROMPTS, DECODING, {"base": "greedy"}, 3, 40, heads=HEADS)
    assert not any(
        isinstance(value, torch.Tensor) for one in scored["base"] for value in asdict(one).values()
    )


@pytest.mark.parametrize("rows", [2, 7, 64])
def test_systems_that_are_answered_together_answer_as_each_does_alone(llm, rows):
    prompts = [Prompt(f"{n} {text}", text * (n + 1)) for n in range(3) for text in TEXTS]
    policies: dict[str, Policy | Plain] = {
        "base": "greedy",
        "agent": AgentPolicy(make_agent(seed=2, bias=0.0), threshold=0.4),
        "other": AgentPolicy(make_agent(seed=3, bias=0.0), threshold=0.6),
        "sampled": "sample",
    }
    together = answer_prompts(llm, prompts, DECODING, policies, rows, 60, seed=5)
    for name, policy in policies.items():
        (alone,) = answer_prompts(llm, prompts, DECODING, {name: policy}, 5, 60, seed=5).values()
        for one, other in zip(together[name], alone, strict=True):
            assert one.response_ids == other.response_ids
            assert (one.accepted_ranks, one.num_decisions, one.num_forced) == (
                other.accepted_ranks,
                other.num_decisions,
                other.num_forced,
            )
    texts = {name: [answer.response_ids for answer in answers] for name, answers in together.items()}
    assert len({str(ids) for ids in texts.values()}) == len(policies)


def test_ways_to_use_an_agent_are_judged_as_the_evaluation_judges_and_the_best_is_chosen(llm):
    agent = make_agent(seed=2, bias=0.0)
    prompts = [Prompt(f"{n} {text}", text * (n + 1)) for n in range(3) for text in TEXTS]
    changes = [
        {},
        {"gate": GateConfig(max_first_probability=0.3)},
        {"gate": GateConfig(min_confidence=0.99)},
        {"steering": "value", "min_advantage": 1e6},
    ]
    ways = [DECODING.model_copy(update=change) for change in changes]
    critic = TwinCritic(32, (16, 8))
    dense, *gated = try_ways(llm, agent, critic, ways, prompts, HEADS, WEIGHTS, rows=7, max_prompt_tokens=60)
    policy = steered_by(agent, DECODING)
    report = evaluate(llm, policy, prompts, HEADS, WEIGHTS, DECODING, rows=7, max_prompt_tokens=60)
    assert report.forced_share is not None
    by_value = steered_by(agent, ways[3], critic)
    assert (
        evaluate(llm, by_value, prompts, HEADS, WEIGHTS, ways[3], rows=7, max_prompt_tokens=60).forced_share
        is None
    )
    assert dense.joint == report.preference["joint"]
    assert dense.perplexity == pytest.approx(report.fluency["agent"].perplexity)
    answers = answer_prompts(
        llm,
        prompts,
        DECODING,
        {"base": "greedy", "agent": AgentPolicy(agent, DECODING.threshold)},
        7,
        60,
        heads=HEADS,
    )
    gain = 0.0
    for name, weight in WEIGHTS.items():
        ours, theirs = (np.array([one.scores[name] for one in answers[of]]) for of in ("agent", "base"))
        gain += weight * (ours - theirs).mean() / theirs.std() / sum(map(abs, WEIGHTS.values()))
    assert dense.gain == pytest.approx(gain)
    scores = {
        name: np.array([[one.scores[name] for one in answers[of]] for of in ("agent", "base")])
        for name in WEIGHTS
    }
    gain_N = sum(
        weight * (scores[name][0] - scores[name][1]) / scores[name][1].std()
        for name, weight in WEIGHTS.items()
    ) / sum(map(abs, WEIGHTS.values()))
    assert dense.gain_error == pytest.approx(1.96 * np.std(gain_N, ddof=1) / len(prompts) ** 0.5)
    changed = [rank > 0 for one in answers["agent"] for rank in one.accepted_ranks]
    assert dense.interventions == sum(changed) / sum(len(one.response_ids) for one in answers["agent"])
    # A gate that is never open leaves the LLM's own answers, and so does a bar that no value reaches.
    for shut in gated[1:]:
        assert shut.interventions == 0 and shut.joint.ties == len(prompts) and shut.gain == 0
    assert 0 < gated[0].interventions < dense.interventions
    best = replace(gated[0], gain=0.5, interventions=0.1)
    outcomes = [
        replace(dense, gain=0.9, interventions=0.4),
        best,
        replace(best, gain=0.4),
        replace(best, gain=0.6, interventions=0.3),
    ]
    assert choose_gate(outcomes, 0.5) is best
    assert choose_gate(outcomes, 0.9) is outcomes[3]
    assert choose_gate(outcomes, 0.1) is None
    # Of an agent that never steps in by itself no share can be taken.
    assert choose_gate([replace(dense, gain=0.0, interventions=0.0), *outcomes[1:]], 0.5) is outcomes[3]
    assert is_proved(replace(best, gain=0.5, gain_error=0.4))
    for gain, error in ((0.5, 0.6), (-0.5, 0.1), (0.5, 0.0), (0.0, 0.0)):
        assert not is_proved(replace(best, gain=gain, gain_error=error))
