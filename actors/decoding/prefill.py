"""How prompts are read: which of them in one forward pass, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence

PASS_OVERHEAD_TOKENS = {"cpu": 32, "cuda": 1024}
"""What a forward pass costs beside its tokens, in tokens. On two CPU cores a pass of SmolLM2 costs as much as
some 30 tokens before it has read any. On a GPU it takes the host longer to start the kernels of a pass than
the GPU to read a thousand tokens."""
MAX_PASS_TOKENS = 8192
"""Most tokens in one pass, padding included, so that its activations stay small beside the cache."""


def group_by_length(lengths: Sequence[int], overhead_tokens: int) -> list[list[int]]:
    """Split prompts of ``lengths`` (>= 1) into passes, so that padding and the number of passes cost least.

    Returns indices into ``lengths``, each once, shortest first: a pass pads its prompts to its longest. The
    split is the cheapest one into runs of the sorted lengths, by dynamic programming.

    Example: ``[50, 5, 48]`` with an overhead of 32 gives ``[[1], [2, 0]]``: the two of about 50 tokens are
    one pass.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    # cheapest[n]: cost of the n shortest prompts; cuts[n]: where their last pass begins.
    cheapest, cuts = [0.0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs = {
            begin: cheapest[begin] + longest * (end - begin) + overhead_tokens
            for begin in range(end)
            if longest * (end - begin) <= MAX_PASS_TOKENS or begin == end - 1
        }
        cut = min(costs, key=costs.__getitem__)
        cheapest.append(costs[cut])
        cuts.append(cut)
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        groups.insert(0, order[cuts[end] : end])
        end = cuts[end]
    return groups


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all of two or more different prompts begin, less the last token of the shortest.

    A chat template's system message, for example. At least one token of each prompt is left to be read.
    """
    if len({tuple(prompt) for prompt in prompts}) < 2:
        return []
    shortest, *others = sorted(prompts, key=len)
    length = len(shortest) - 1
    for prompt in others:
        while list(prompt[:length]) != list(shortest[:length]):
            length -= 1
    return list(shortest[:length])
