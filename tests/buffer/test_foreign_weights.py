"""Weights on a real server that somebody else has published, or that are damaged."""

from __future__ import annotations

import numpy as np
import pytest
import redis
import torch
from safetensors.torch import save

from mara.buffer.keys import keys_of
from mara.buffer.weights import RedisWeightChannel
from mara.common.errors import DamagedWeights

WEIGHTS = {"w": torch.arange(20.0), "b": torch.ones(3, dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\xff" * 8 + b"{}",
        (10**9).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        save(WEIGHTS)[:-1],
        save(WEIGHTS) + b"more",
        save(WEIGHTS).replace(b"BF16", b"XX16"),
    ],
)
def test_bytes_that_are_no_weights_are_told_with_their_version(
    client: redis.Redis, run_id: str, content: bytes
) -> None:
    channel, keys = RedisWeightChannel(client, run_id), keys_of(run_id)
    client.hset(keys.weights, mapping={"version": 4, "published_at_s": "1.0", "agent": ""})
    client.set(keys.tensors, content)
    with pytest.raises(DamagedWeights) as damaged:
        channel.fetch_newer(than=3)
    assert damaged.value.version == 4
    assert "cannot be read" in damaged.value.why and "\n" not in damaged.value.why
    assert channel.fetch_newer(than=3, skip=4) is None
    assert channel.publish(5, WEIGHTS)
    newer = channel.fetch_newer(than=3, skip=4)
    assert newer is not None and newer.version == 5


def test_any_flipped_byte_gives_weights_or_the_one_error(client: redis.Redis, run_id: str) -> None:
    channel, key = RedisWeightChannel(client, run_id), keys_of(run_id).tensors
    assert channel.publish(1, WEIGHTS)
    content = client.get(key)
    rng, damaged = np.random.default_rng(0), 0
    for _ in range(2000):
        changed = bytearray(content)
        for at in rng.integers(0, len(content), int(rng.integers(1, 4))):
            changed[at] = rng.integers(256)
        if rng.random() < 0.3:
            del changed[rng.integers(len(changed)) :]
        client.set(key, bytes(changed))
        try:
            channel.fetch_newer(than=0)
        except DamagedWeights:
            damaged += 1
    assert 1000 < damaged < 2000


@pytest.mark.parametrize("version", [b"", b"many", b"1.5", b"9" * 40, b"\xff"])
def test_what_is_no_version_stands_in_nobodys_way(client: redis.Redis, run_id: str, version: bytes) -> None:
    channel, key = RedisWeightChannel(client, run_id), keys_of(run_id).weights
    client.hset(key, mapping={"version": version, "agent": "other"})
    assert channel.fetch_newer(than=-1) is None
    assert not channel.holds(0)
    assert channel.publish(0, WEIGHTS)
    assert channel.holds(0)


def test_weights_of_another_agent_are_replaced_whatever_their_version(
    client: redis.Redis, run_id: str
) -> None:
    ours = RedisWeightChannel(client, run_id, agent_digest="ours")
    theirs = RedisWeightChannel(client, run_id, agent_digest="theirs")
    assert ours.publish(3, WEIGHTS)
    assert theirs.publish(1000, WEIGHTS)
    assert not ours.holds(3)
    assert ours.publish(3, WEIGHTS)
    newer = ours.fetch_newer(than=2)
    assert newer is not None and (newer.version, newer.agent_digest) == (3, "ours")
    with pytest.raises(ValueError, match="version 3 is not above the published 3"):
        ours.publish(3, WEIGHTS)
