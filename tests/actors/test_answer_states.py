"""Hidden states of answers, read and sampled, against one plain forward pass for each sequence."""

from __future__ import annotations

import pytest
import torch

from mara.actors.answer_states import Sampler, read_answers, sample_answers
from mara.actors.config import LLMConfig
from mara.actors.llm import LLM, load_llm

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]


@pytest.fixture(scope="module")
def llm(llm_folder) -> LLM:
    return load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu"))


def plain_states(llm: LLM, prompt: list[int], answer: tuple[int, ...]) -> torch.Tensor:
    return llm.hidden_states([[*prompt, *answer]])[0][len(prompt) :]


@pytest.mark.parametrize("max_batch_tokens", [8, 4096])
def test_states_read_with_a_shared_prompt_are_those_of_the_whole_sequence(llm, max_batch_tokens):
    groups = [(prompt, [[20, 21, 22, 23], [24], [25, 26]]) for prompt in PROMPTS]
    for (prompt, _), answers in zip(
        groups, read_answers(llm, groups, max_batch_tokens=max_batch_tokens), strict=True
    ):
        assert [answer.ids for answer in answers] == [(20, 21, 22, 23), (24,), (25, 26)]
        for answer in answers:
            expected = plain_states(llm, prompt, answer.ids)
            torch.testing.assert_close(answer.states_ND, expected, atol=1e-5, rtol=1e-4)


def test_states_of_sampled_answers_are_those_of_reading_them(llm):
    samplers = [Sampler(temperature=0), Sampler(), Sampler(top_k=5, slip=1, slip_to_last=True)]
    drawn = sample_answers(llm, PROMPTS, samplers, 12, torch.Generator().manual_seed(0), rows=4)
    for prompt, answers in zip(PROMPTS, drawn, strict=True):
        assert len(answers) == len(samplers)
        for answer in answers:
            assert len(answer.ids) == 12 or answer.ids[-1] in llm.eos_ids
            assert not set(answer.ids[:-1]) & set(llm.eos_ids)
            expected = plain_states(llm, prompt, answer.ids)
            torch.testing.assert_close(answer.states_ND, expected, atol=1e-5, rtol=1e-4)


def test_temperature_zero_takes_the_most_probable_token(llm):
    answer = sample_answers(llm, PROMPTS[:1], [Sampler(temperature=0)], 6, torch.Generator())[0][0]
    ids = list(PROMPTS[0])
    for token in answer.ids:
        assert token == int(llm.model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_candidates_are_cut_by_the_models_own_probabilities(make_model, family):
    llm = LLM(make_model(family), tokenizer=None, name=family)
    last = Sampler(top_k=40, top_p=0.9, slip=1, slip_to_last=True)
    answer = sample_answers(llm, PROMPTS[:1], [last], 6, torch.Generator())[0][0]
    ids = list(PROMPTS[0])
    for token in answer.ids:
        probabilities = torch.softmax(llm.model(torch.tensor([ids])).logits[0, -1], -1)
        ordered, tokens = probabilities.sort(descending=True)
        size = int((ordered.cumsum(0) - ordered < 0.9)[:40].sum())
        assert token == int(tokens[size - 1])
        ids.append(token)


def test_prompts_without_answers_are_passed_over(llm):
    counted: list[tuple[int, int]] = []
    groups = [(PROMPTS[0], []), (PROMPTS[1], [[20, 21]]), (PROMPTS[2], [])]
    for budget in (1, 4096):
        answers = read_answers(llm, groups, lambda *done: counted.append(done), max_batch_tokens=budget)
        assert [len(group) for group in answers] == [0, 1, 0]
        torch.testing.assert_close(
            answers[1][0].states_ND, plain_states(llm, PROMPTS[1], (20, 21)), atol=1e-5, rtol=1e-4
        )
        assert counted[-1] == (3, 3)
    assert read_answers(llm, [(PROMPTS[0], [])]) == [[]]


def test_a_slip_takes_any_candidate_but_the_first_and_stays_inside_the_set():
    probs_K = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    generator = torch.Generator().manual_seed(0)

    def draws(sampler: Sampler) -> set[int]:
        return {sampler.draw(probs_K.log(), probs_K, generator) for _ in range(200)}

    assert draws(Sampler(top_k=5, top_p=0.9, slip=1)) == {1, 2}
    assert draws(Sampler(top_k=5, top_p=0.9, slip=1, slip_to_last=True)) == {2}
    assert draws(Sampler(top_k=2, top_p=1.0)) == {0, 1}
    assert draws(Sampler(top_k=5, top_p=0.4, slip=1)) == {0}
    assert draws(Sampler(top_k=5, top_p=1.0, temperature=0)) == {0}
