"""The rule of acceptance."""

import pytest

from mara.actors.decoding.acceptance import Verdict, examine


@pytest.mark.parametrize(
    ("accepts", "first_rank", "num_candidates", "fallback", "expected"),
    [
        ([True, True], 0, 4, "last", Verdict(1, 0)),
        ([False, True, True], 0, 5, "last", Verdict(2, 1)),
        ([False, False], 1, 5, "last", Verdict(2, None)),
        ([False, False], 3, 5, "last", Verdict(2, 1)),
        ([False, False], 3, 5, "first", Verdict(2, None)),
        ([False, True], 3, 5, "first", Verdict(2, 1)),
        ([False], 0, 1, "last", Verdict(1, 0)),
    ],
)
def test_the_first_accepted_candidate_is_taken_and_no_later_one_is_asked(
    accepts, first_rank, num_candidates, fallback, expected
):
    assert examine(accepts, first_rank, num_candidates, fallback) == expected
