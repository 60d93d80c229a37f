import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mara.actors.config import TruncationConfig
from mara.actors.decoding.candidates import log_totals, truncate


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(1, 45),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0.2, 3.0),
)
def test_the_set_is_that_of_chained_samplers_sorted_by_probability(seed, top_k, top_p, temperature):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * 3
    found = truncate(logits, TruncationConfig(top_k=top_k, top_p=top_p, temperature=temperature))
    chain = LogitsProcessorList(
        [TopKLogitsWarper(top_k), TopPLogitsWarper(top_p), TemperatureLogitsWarper(temperature)]
    )
    expected = torch.log_softmax(chain(torch.zeros(3, 1, dtype=torch.long), logits), dim=-1)
    for row in range(3):
        num = int(found.num_B[row])
        ids = found.ids_BK[row, :num]
        assert set(ids.tolist()) == set(torch.isfinite(expected[row]).nonzero()[:, 0].tolist())
        torch.testing.assert_close(found.reference_logprobs_BK[row, :num], expected[row, ids])
        assert (logits[row, ids].diff() <= 0).all()
        assert torch.isneginf(found.reference_logprobs_BK[row, num:]).all()


def test_the_example_in_the_documentation_holds():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    found = truncate(logits, TruncationConfig(top_k=3, top_p=0.8, temperature=1.0))
    assert found.ids_BK[0, : int(found.num_B[0])].tolist() == [0, 1]
    torch.testing.assert_close(found.reference_logprobs_BK[0, :2].exp(), torch.tensor([0.625, 0.375]))
    torch.testing.assert_close(found.full_logprobs_BK[0].exp(), torch.tensor([0.5, 0.3, 0.15]))


def test_equal_logits_are_ordered_by_token_id():
    found = truncate(torch.zeros(1, 6), TruncationConfig(top_k=6, top_p=1.0))
    assert found.ids_BK[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_of_tokens_tied_at_the_border_the_lowest_ids_are_candidates():
    logits = torch.zeros(3, 200)
    logits[0, 7] = 2.0
    logits[1, 150:] = 1.0
    logits[2] = torch.arange(200.0)
    found = truncate(logits, TruncationConfig(top_k=4, top_p=1.0))
    assert found.ids_BK.tolist() == [[7, 0, 1, 2], [150, 151, 152, 153], [199, 198, 197, 196]]
    total = torch.logsumexp(logits[0], -1)
    torch.testing.assert_close(found.full_logprobs_BK[0], torch.tensor([2.0, 0.0, 0.0, 0.0]) - total)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 5),
    vocabulary=st.one_of(st.integers(1, 60), st.integers(200, 2000)),
    top_k=st.integers(1, 70),
    levels=st.integers(1, 12),
)
def test_the_order_is_by_logit_and_then_by_id_however_many_are_equal(seed, rows, vocabulary, top_k, levels):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (rows, vocabulary), generator=generator).float()
    found = truncate(logits, TruncationConfig(top_k=top_k, top_p=1.0))
    for row in range(rows):
        expected = sorted(range(vocabulary), key=lambda token: (-float(logits[row, token]), token))[:top_k]
        assert found.ids_BK[row].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [262_144, 100_003, 64 * 41, 63, 1])
def test_of_a_vocabulary_of_any_size_the_whole_counts(vocabulary: int, dtype: torch.dtype) -> None:
    logits = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(3)).mul(5).to(dtype)
    logits[4] = -torch.inf
    logits[4, -1] = 2.0
    before, totals = logits.clone(), torch.logsumexp(logits.double(), -1)
    found = truncate(logits, TruncationConfig(top_k=40, top_p=1.0))
    ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    k = min(40, vocabulary)
    assert torch.equal(found.ids_BK, ids[:, :k])
    expected = ordered[:, :k].double() - totals[:, None]
    torch.testing.assert_close(found.full_logprobs_BK.double(), expected, atol=3e-5, rtol=0)
    torch.testing.assert_close(log_totals(logits).double(), totals, atol=3e-5, rtol=0)
    assert torch.equal(logits, before)


def test_one_certain_token_is_the_only_candidate():
    logits = torch.full((1, 8), -50.0)
    logits[0, 5] = 50.0
    found = truncate(logits, TruncationConfig(top_k=8, top_p=0.95))
    assert int(found.num_B[0]) == 1 and int(found.ids_BK[0, 0]) == 5
