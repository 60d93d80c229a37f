"""What an LLM makes of given text, against plain forward passes and heads that read it one by one."""

from __future__ import annotations

import pytest
import torch

from mara.actors.config import LLMConfig
from mara.actors.head_config import HeadShape
from mara.actors.heads import HeadRewardModel, RewardHead
from mara.actors.llm import LLM, load_llm
from mara.actors.reading import read_responses
from mara.common.contracts import Conversation
from mara.common.errors import UserError

SAID = [
    Conversation(prompt, response)
    for prompt, response in (
        ("why", "abc"),
        ("how so", "the end of it all"),
        ("why", ""),
        ("why", "a b c d e f g"),
        ("x", "zz"),
        ("how so", "x"),
    )
]


@pytest.fixture(scope="module")
def llm(llm_folder) -> LLM:
    return load_llm(LLMConfig(model=str(llm_folder), dtype="float32", device="cpu"))


@pytest.fixture
def bare(llm) -> LLM:
    """Without a chat template: a prompt may be a single token."""
    tokenizer = type(llm.tokenizer).from_pretrained(llm.name)
    tokenizer.chat_template = None
    return LLM(llm.model, tokenizer, llm.name)


@pytest.mark.parametrize("kind", ["llm", "bare"])
def test_responses_are_as_probable_as_plain_forward_passes_say(kind, request):
    llm: LLM = request.getfixturevalue(kind)
    found = read_responses(llm, SAID)
    assert (len(llm.render("x")) == 1) == (kind == "bare")
    for said, reading in zip(SAID, found, strict=True):
        prompt = llm.render(said.prompt)
        words = list(llm.tokenizer(said.response, add_special_tokens=False)["input_ids"])
        assert reading.num_tokens == len(words) == len(said.response) == len(reading.states_ND)
        output = llm.model(torch.tensor([prompt + words]), output_hidden_states=True)
        logprobs_LV = torch.log_softmax(output.logits[0].double(), -1)[len(prompt) - 1 :]
        total = sum(float(logprobs_LV[n, word]) for n, word in enumerate(words))
        assert reading.logprob == pytest.approx(total, abs=1e-3)
        states_ND = output.hidden_states[-1][0, len(prompt) :]
        assert torch.allclose(reading.states_ND, states_ND, atol=1e-4)


def test_a_head_scores_what_was_read_as_it_scores_the_text(llm):
    head = RewardHead(HeadShape(hidden_size=32, width=8)).requires_grad_(False).eval()
    draws = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        parameter.normal_(generator=draws)
    found = head.score_states([reading.states_ND for reading in read_responses(llm, SAID)])
    assert torch.allclose(found, HeadRewardModel(llm, head).score(SAID), atol=1e-4)
    assert len(set(found.tolist())) > 3


def test_a_text_with_a_probability_that_is_no_number_is_named(llm, monkeypatch):
    monkeypatch.setattr("mara.actors.reading.read_answers", lambda llm, groups: broken(groups))
    with pytest.raises(UserError, match=r"the probabilities of the text 'abc' are not finite"):
        read_responses(llm, SAID[:1])


def broken(groups):
    from mara.actors.answer_states import Answer

    return [
        [Answer(tuple(ids), torch.full((len(ids), 32), torch.nan)) for ids in answers]
        for _, answers in groups
    ]
