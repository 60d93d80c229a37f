"""Which prompts are read together, against trying every split."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mara.actors.decoding.prefill import MAX_PASS_TOKENS, common_prefix, group_by_length


@given(st.lists(st.integers(1, 120), max_size=8), st.sampled_from([0, 32, 1024]))
def test_no_split_of_the_sorted_prompts_is_cheaper(lengths, overhead):
    def cost(groups):
        return sum(max(lengths[i] for i in group) * len(group) + overhead for group in groups)

    groups = group_by_length(lengths, overhead)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for cuts in itertools.product([False, True], repeat=max(0, len(lengths) - 1)):
        split, group = [], order[:1]
        for index, cut in zip(order[1:], cuts, strict=True):
            if cut:
                split.append(group)
                group = []
            group = [*group, index]
        assert cost(groups) <= cost([*split, group] if group else [])


def test_a_pass_stays_within_its_limit_and_a_longer_prompt_is_alone():
    lengths = [1000] * 20 + [MAX_PASS_TOKENS + 5]
    groups = group_by_length(lengths, 32)
    assert all(len(group) * 1000 <= MAX_PASS_TOKENS for group in groups[:-1])
    assert groups[-1] == [20]


@given(
    st.lists(st.integers(0, 3), max_size=4),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=4),
)
def test_the_common_prefix_is_the_longest_that_leaves_every_prompt_a_token(prefix, tails):
    prompts = [prefix + tail for tail in tails]
    found = common_prefix(prompts)
    if len({tuple(prompt) for prompt in prompts}) < 2:
        assert found == []
        return
    assert all(prompt[: len(found)] == found and len(prompt) > len(found) for prompt in prompts)
    longer = min(prompts, key=len)[: len(found) + 1]
    assert len(longer) == min(map(len, prompts)) or any(prompt[: len(longer)] != longer for prompt in prompts)
