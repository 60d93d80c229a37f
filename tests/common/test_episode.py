import numpy as np
import torch

from mara.common.episode import Episode, policy_token_logprobs


def make_episode(rows) -> Episode:
    """``rows``: (action, rank, position, forced, accept probability) of each decision; sets of three."""
    actions, ranks, positions, forced, accepts = map(np.array, zip(*rows, strict=True))
    with np.errstate(divide="ignore"):
        reject = np.log(1 - accepts)
    return Episode(
        uid="a",
        prompt_id="p",
        actor_id="actor-0",
        prompt_ids_P=np.arange(4, dtype=np.int32),
        response_ids_N=np.arange(2, dtype=np.int32),
        states_TD=torch.zeros(len(rows), 6, dtype=torch.bfloat16),
        actions_T=actions.astype(np.uint8),
        ranks_T=ranks.astype(np.int16),
        num_candidates_T=np.full(len(rows), 3, np.int16),
        positions_T=positions.astype(np.int32),
        forced_T=forced.astype(bool),
        reference_logprobs_T=np.full(len(rows), np.log(1 / 3), np.float32),
        accept_logprobs_T=np.log(accepts).astype(np.float32),
        reject_logprobs_T=reject.astype(np.float32),
        policy_versions_T=np.zeros(len(rows), np.int64),
        finish_reason="length",
        started_at_s=0.0,
        finished_at_s=1.0,
    )


def test_token_probabilities_are_acceptances_times_the_rejections_before_them():
    episode = make_episode(
        [(0, 0, 0, False, 0.5), (0, 1, 0, False, 0.25), (1, 2, 0, True, 1.0), (1, 0, 1, False, 0.8)]
    )
    np.testing.assert_allclose(np.exp(policy_token_logprobs(episode)), [0.5, 0.125, 0.375, 0.8], rtol=1e-6)


def test_token_probabilities_of_a_whole_set_sum_to_one():
    episode = make_episode([(0, 0, 0, False, 0.3), (0, 1, 0, False, 0.6), (1, 2, 0, True, 1.0)])
    assert np.exp(policy_token_logprobs(episode)).sum() == np.float32(1.0)


def test_a_retaken_first_candidate_has_the_probability_of_both_ways_to_it():
    episode = make_episode(
        [
            (0, 0, 0, False, 0.3),
            (0, 1, 0, False, 0.6),
            (0, 2, 0, False, 0.5),
            (1, 0, 0, True, 1.0),
            (1, 0, 1, False, 0.8),
        ]
    )
    retaken = 0.3 + 0.7 * 0.4 * 0.5
    found = np.exp(policy_token_logprobs(episode))
    np.testing.assert_allclose(found, [0.3, 0.7 * 0.6, 0.7 * 0.4 * 0.5, retaken, 0.8], rtol=1e-6)
    # Without the rejection of the first candidate: one record for each token of the set.
    np.testing.assert_allclose(found[1:4].sum(), 1.0, rtol=1e-6)


def test_the_retaken_candidate_is_taken_as_often_as_it_says():
    accepts, rng = np.array([0.3, 0.6, 0.5]), np.random.default_rng(0)
    rejected = rng.random((20_000, 3)) >= accepts
    first = ~rejected[:, 0] | rejected.all(1)
    episode = make_episode(
        [*((0, rank, 0, False, p) for rank, p in enumerate(accepts)), (1, 0, 0, True, 1.0)]
    )
    assert np.exp(policy_token_logprobs(episode)[-1]) == np.float32(0.44)
    assert abs(first.mean() - 0.44) < 0.02


def test_bytes_are_those_of_the_arrays():
    episode = make_episode([(1, 0, 0, False, 0.5), (1, 0, 1, False, 0.5)])
    states, ids = 2 * 6 * 2, (4 + 2) * 4
    per_decision = 1 + 2 + 2 + 4 + 1 + 4 + 4 + 4 + 8
    assert episode.nbytes == states + ids + 2 * per_decision
