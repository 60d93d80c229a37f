"""The wire format: what goes in comes out, and nothing else than an episode ever does."""

from __future__ import annotations

import resource
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mara.buffer.codec import MalformedRecord, RecordLimits, decode_episode, encode_episode
from mara.buffer.config import ShapingConfig
from mara.buffer.shaping import shape_episode
from mara.common.episode import Episode

MakeEpisode = Callable[..., Episode]
Same = Callable[[Episode, Episode], bool]


def changed(record: bytes, **fields: Any) -> bytes:
    """The record with some fields replaced; ``...`` removes one."""
    content = msgpack.unpackb(record) | fields
    return bytes(msgpack.packb({name: value for name, value in content.items() if value is not ...}))


@settings(max_examples=60, deadline=None)
@given(
    uid=st.text(min_size=1, max_size=40).filter(lambda text: text.isprintable()),
    seed=st.integers(0, 1000),
    num_tokens=st.integers(0, 30),
    hidden_size=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    scores=st.dictionaries(st.text(max_size=10), st.floats(-1e6, 1e6), max_size=5),
)
def test_an_episode_survives_the_wire(
    make_episode: MakeEpisode,
    same: Same,
    uid: str,
    seed: int,
    num_tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    scores: dict[str, float],
) -> None:
    episode = make_episode(uid, seed, num_tokens, hidden_size, dtype, scores=scores)
    assert same(decode_episode(encode_episode(episode)), episode)


def test_states_of_a_view_are_encoded_as_they_look(make_episode: MakeEpisode, same: Same) -> None:
    episode = make_episode(seed=1, num_tokens=9)
    every_other = replace(episode, states_TD=episode.states_TD.repeat_interleave(2, dim=1)[:, ::2])
    assert not every_other.states_TD.is_contiguous()
    assert same(decode_episode(encode_episode(every_other)), episode)


def test_a_record_is_little_more_than_its_states(make_episode: MakeEpisode) -> None:
    episode = make_episode(num_tokens=60, hidden_size=576)
    assert len(encode_episode(episode)) < 1.05 * episode.num_decisions * (2 * 576 + 32)


@pytest.mark.parametrize("letters", [1, 2])
def test_decoded_states_lie_in_the_record_and_keep_it_alive(
    make_episode: MakeEpisode, same: Same, letters: int
) -> None:
    """However long the texts before them are: they begin at an even place."""
    episode = make_episode(uid="u" * letters, hidden_size=4096)
    record = encode_episode(episode)
    address = np.frombuffer(record, np.uint8).ctypes.data
    decoded = decode_episode(record)
    end = decoded.states_TD.data_ptr() + 2 * decoded.states_TD.numel()
    assert end == address + len(record)
    del record
    noise = [bytes([number]) * 100_000 for number in range(100)]
    assert same(decoded, episode) and len(noise) == 100


def test_states_at_an_odd_place_and_before_other_fields_are_read_too(same: Same) -> None:
    (wanted,) = [decode_episode(msgpack.packb(SMALL))]
    for name in ("uid", "states_TD", "schema"):
        for filling in ("a", "aa"):
            first = {name: SMALL[name], **SMALL, "actor_id": filling}
            found = decode_episode(msgpack.packb(first))
            assert same(found, replace(wanted, actor_id=filling))


@pytest.mark.parametrize(("dtype", "exponent"), [("float16", 0x7C00), ("bfloat16", 0x7F80)])
def test_every_number_that_is_not_finite_is_found_wherever_it_is(dtype: str, exponent: int) -> None:
    all_bits = np.arange(1 << 16, dtype="<u2")
    is_finite = (all_bits & exponent) != exponent
    for number, bits in enumerate(all_bits[~is_finite]):
        states = np.full(2 * 67, 0x3C00, "<u2")
        states[number % len(states)] = bits
        with pytest.raises(MalformedRecord, match="infinities or not-a-numbers"):
            decode_episode(small(states_dtype=dtype, hidden_size=67, states_TD=states.tobytes()))
    finite = np.resize(all_bits[is_finite], 1 << 16)
    decode_episode(small(states_dtype=dtype, hidden_size=1 << 15, states_TD=finite.tobytes()))


def test_the_encoder_refuses_an_array_of_another_dtype(make_episode: MakeEpisode) -> None:
    episode = make_episode()
    with pytest.raises(ValueError, match=r"ranks_T is int64.*int16"):
        encode_episode(replace(episode, ranks_T=episode.ranks_T.astype(np.int64)))
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        encode_episode(replace(episode, states_TD=episode.states_TD.float()))


def int16(*values: int) -> bytes:
    return np.array(values, "<i2").tobytes()


def int32(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def float32(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


# One rejection and the forced acceptance at position 0 of a one-token answer, D = 1.
SMALL: dict[str, Any] = {
    "schema": 1,
    "uid": "u",
    "prompt_id": "p",
    "actor_id": "a",
    "finish_reason": "eos",
    "started_at_s": 1.0,
    "finished_at_s": 2.0,
    "scores": {"helpful": 0.5},
    "prefix_scores": {"helpful": float32(0.5)},
    "prompt_ids_P": int32(5),
    "response_ids_N": int32(7),
    "actions_T": b"\0\1",
    "ranks_T": int16(0, 1),
    "num_candidates_T": int16(2, 2),
    "positions_T": int32(0, 0),
    "forced_T": b"\0\1",
    "reference_logprobs_T": float32(-0.5, -1.0),
    "accept_logprobs_T": float32(-0.7, 0.0),
    "reject_logprobs_T": float32(-0.7, -np.inf),
    "policy_versions_T": np.array([3, 4], "<i8").tobytes(),
    "hidden_size": 1,
    "states_dtype": "float16",
    "states_TD": np.array([1.0, 2.0], "<f2").tobytes(),
}


def small(**fields: Any) -> bytes:
    return bytes(msgpack.packb(SMALL | fields))


def test_the_written_example_is_an_episode() -> None:
    episode = decode_episode(msgpack.packb(SMALL))
    assert episode.states_TD.tolist() == [[1.0], [2.0]]
    assert episode.policy_versions_T.tolist() == [3, 4]
    assert episode.scores == {"helpful": 0.5}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"schema": 2}, r"unknown schema 2; this version reads schema 1"),
        ({"schema": True}, r"unknown schema True"),
        ({"schema": ...}, r"unknown schema None"),
        ({"uid": ...}, r"field uid is missing"),
        ({"extra": 1}, r"field 'extra' is not known"),
        ({"uid": 5}, r"uid is 5, not str"),
        ({"uid": ""}, r"uid is empty"),
        ({"uid": "x" * 600}, r"not a msgpack record"),
        ({"finish_reason": "bored"}, r"finish_reason 'bored' is neither"),
        ({"finished_at_s": float("nan")}, r"finished_at_s is nan"),
        ({"started_at_s": 1}, r"started_at_s is 1, not a finite float"),
        ({"scores": {"helpful": float("inf")}}, r"score 'helpful' is inf"),
        ({"scores": {"helpful": 1e300}}, r"score 'helpful' is 1e\+300, beyond"),
        ({"scores": {b"helpful": 1.0}}, r"which is not text"),
        ({"scores": []}, r"scores is \[\], not dict"),
        ({"scores": {str(n): 1.0 for n in range(65)}}, r"msgpack|more than 64"),
        ({"prefix_scores": {"helpful": float32(0.5, 0.5)}}, r"'helpful' has 2 entries, the response has 1"),
        ({"prefix_scores": {"helpful": float32(np.nan)}}, r"'helpful' holds something else"),
        ({"prefix_scores": {"helpful": 0.5}}, r"helpful is 0.5, not bytes"),
        ({"prompt_ids_P": int32(-5)}, r"prompt_ids_P holds a negative token id"),
        ({"actions_T": b"\0\2"}, r"actions_T holds something else than 0 and 1 \(entry 1\)"),
        ({"actions_T": b"\1"}, r"_T has 2 entries, actions_T has 1"),
        ({"actions_T": b"\0\0"}, r"actions_T ends with a rejection"),
        ({"actions_T": b"\1\1"}, r"positions_T does not advance exactly at the acceptances"),
        ({"forced_T": b"\1\1"}, r"actions_T rejects where acceptance was forced"),
        ({"forced_T": b"\0\3"}, r"forced_T holds something else"),
        ({"ranks_T": int16(0, 2)}, r"ranks_T is outside its set \(entry 1\)"),
        ({"ranks_T": b"\0\0\0"}, r"ranks_T has 3 bytes, not a multiple of 2"),
        ({"num_candidates_T": int16(1, 2)}, r"fewer than 2 candidates"),
        ({"positions_T": int32(1, 1)}, r"positions_T is outside the response"),
        ({"positions_T": int32(0, -1)}, r"positions_T is outside the response"),
        ({"reference_logprobs_T": float32(np.nan, -1)}, r"reference_logprobs_T holds something else"),
        ({"accept_logprobs_T": float32(-np.inf, 0)}, r"accept_logprobs_T holds something else"),
        ({"accept_logprobs_T": float32(0.5, 0)}, r"accept_logprobs_T holds something else"),
        ({"reject_logprobs_T": float32(-np.inf, -np.inf)}, r"-inf exactly where forced \(entry 0\)"),
        ({"reject_logprobs_T": float32(-0.7, -0.7)}, r"-inf exactly where forced \(entry 1\)"),
        ({"accept_logprobs_T": float32(-0.7, -0.1)}, r"accept_logprobs_T is not 0 where forced \(entry 1\)"),
        ({"hidden_size": 2}, r"states_TD has 4 bytes, 2 decisions of size 2 take 8"),
        ({"hidden_size": 0}, r"hidden_size 0 is outside"),
        ({"hidden_size": 1 << 40}, r"hidden_size 1099511627776 is outside"),
        ({"states_dtype": "float32"}, r"states_dtype 'float32' is not one of"),
        ({"states_TD": "text"}, r"states_TD is 'text', not bytes"),
        ({"states_TD": np.array([1.0, np.inf], "<f2").tobytes()}, r"infinities or not-a-numbers"),
        ({"states_dtype": "bfloat16", "states_TD": b"\x80\x7f\0\0"}, r"infinities or not-a-numbers"),
    ],
)
def test_a_record_that_breaks_a_rule_is_refused_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(MalformedRecord, match=reason) as caught:
        decode_episode(changed(msgpack.packb(SMALL), **fields))
    assert "\n" not in str(caught.value)


def record_of(*decisions: tuple[int, int, int, int, bool]) -> bytes:
    """The small record with other decisions: (position, rank, candidates, action, forced) of each."""
    positions, ranks, num_candidates, actions, forced = zip(*decisions, strict=True)
    columns = {
        "positions_T": int32(*positions),
        "ranks_T": int16(*ranks),
        "num_candidates_T": int16(*num_candidates),
        "actions_T": bytes(actions),
        "forced_T": bytes(forced),
        "reference_logprobs_T": float32(*(-1.0 for _ in decisions)),
        "accept_logprobs_T": float32(*(0.0 if f else -0.7 for f in forced)),
        "reject_logprobs_T": float32(*(-np.inf if f else -0.7 for f in forced)),
        "policy_versions_T": np.zeros(len(decisions), "<i8").tobytes(),
        "states_TD": np.zeros(len(decisions), "<f2").tobytes(),
        "response_ids_N": int32(7, 7),
        "prefix_scores": {},
    }
    return changed(msgpack.packb(SMALL), **columns)


@pytest.mark.parametrize(
    "decisions",
    [
        [(0, 0, 3, 1, False), (1, 0, 2, 0, False), (1, 1, 2, 1, True)],
        [(0, 0, 3, 0, False), (0, 1, 3, 1, False), (1, 0, 5, 1, False)],
        [(0, 0, 2, 0, False), (0, 1, 2, 1, False)],  # a last candidate that was free and accepted
        [(0, 0, 2, 0, False), (0, 1, 2, 0, False), (0, 0, 2, 1, True)],  # rejected: back to the first
        [(0, 0, 2, 0, False), (0, 1, 2, 0, False), (0, 0, 2, 1, True), (1, 0, 3, 1, False)],
    ],
)
def test_decisions_in_an_order_in_which_they_can_be_taken_are_an_episode(
    decisions: list[tuple[int, int, int, int, bool]],
) -> None:
    episode = decode_episode(record_of(*decisions))
    assert episode.ranks_T.tolist() == [rank for _, rank, _, _, _ in decisions]


@pytest.mark.parametrize(
    ("decisions", "reason"),
    [
        ([(0, 2, 3, 1, False)], r"ranks_T does not follow the candidates' order \(entry 0\)"),
        ([(0, 0, 3, 1, False), (1, 1, 3, 1, False)], r"ranks_T does not follow .* \(entry 1\)"),
        ([(0, 0, 3, 0, False), (0, 2, 3, 1, True)], r"ranks_T does not follow .* \(entry 1\)"),
        ([(0, 0, 3, 0, False), (0, 0, 3, 1, False)], r"ranks_T does not follow .* \(entry 1\)"),
        ([(0, 0, 3, 0, False), (0, 0, 3, 1, True)], r"ranks_T does not follow .* \(entry 1\)"),
        ([(0, 0, 2, 0, False), (0, 1, 2, 0, False), (0, 0, 2, 1, False)], r"ranks_T does not follow"),
        ([(0, 0, 2, 1, False), (1, 1, 2, 1, True)], r"ranks_T does not follow .* \(entry 1\)"),
        ([(0, 0, 3, 1, True)], r"forced_T forces a candidate that is not the last \(entry 0\)"),
        ([(0, 0, 3, 0, False), (0, 1, 3, 1, True)], r"forced_T forces .* \(entry 1\)"),
        ([(0, 0, 3, 0, False), (0, 1, 2, 1, True)], r"num_candidates_T changes within .* \(entry 1\)"),
    ],
)
def test_decisions_in_any_other_order_are_refused(
    decisions: list[tuple[int, int, int, int, bool]], reason: str
) -> None:
    with pytest.raises(MalformedRecord, match=reason):
        decode_episode(record_of(*decisions))


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (RecordLimits(max_record_bytes=100), r"record has \d+ bytes, more than 100"),
        (RecordLimits(max_tokens=0), r"prompt_ids_P has 1 entries, more than 0"),
        (RecordLimits(max_decisions=1), r"actions_T has 2 entries, more than 1"),
        (RecordLimits(max_hidden_size=0), r"hidden_size 1 is outside"),
        (RecordLimits(max_scores=0), r"scores has 1 entries, more than 0"),
    ],
)
def test_a_record_beyond_the_limits_is_refused(limits: RecordLimits, reason: str) -> None:
    with pytest.raises(MalformedRecord, match=reason):
        decode_episode(msgpack.packb(SMALL), limits)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x93\1\2\3",
        msgpack.packb(5),
        msgpack.packb(SMALL) + b"\0",
        b"\xdd\xff\xff\xff\xff",  # a list of four thousand million entries
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xc6\xff\xff\xff\xff",  # as many bytes
        b"\x81\xa1s" * 5000,  # nested too deep
        b"\xc7\x0c\xff" + b"\0" * 12,  # a time stamp, which is an extension
        msgpack.packb({"schema": msgpack.ExtType(4, b"x")}),
        b"\x81\x90\1",  # a key that is a list
        b"\x81\xa2\xff\xfe\1",  # a key that is not UTF-8
    ],
)
def test_what_is_not_a_record_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedRecord) as caught:
        decode_episode(data)
    assert len(str(caught.value)) < 300


def test_a_record_of_maps_in_maps_is_refused_before_it_takes_memory() -> None:
    """Three bytes of record make a map of 64 bytes."""
    content: dict[str, Any] = {}
    for _ in range(3):
        content = {chr(32 + n): content for n in range(60)}
    record = msgpack.packb(content)
    assert len(record) > 600_000
    tracemalloc.start()
    with pytest.raises(MalformedRecord, match="more maps than a record has"):
        decode_episode(record)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 256 << 10


def decodes_to_something_usable(data: bytes) -> bool:
    """Whether it is an episode; if so, it can be shaped and trained on."""
    try:
        episode = decode_episode(data)
    except MalformedRecord as error:
        if "\n" in str(error):
            raise AssertionError("more than one line") from error
        return False
    for estimator in ("accepted_log_ratio", "pointwise"):
        shaped = shape_episode(episode, ShapingConfig(kl_estimator=estimator), 1.0)
        assert np.isfinite(shaped.rewards_T).all()
    assert torch.isfinite(episode.states_TD).all()
    return True


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flipped_lost_and_added_bytes_never_raise_anything_else(
    make_episode: MakeEpisode, data: st.DataObject
) -> None:
    record = bytearray(encode_episode(make_episode(seed=data.draw(st.integers(0, 3)), num_tokens=3)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(record)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "drop"]))
        if kind == "flip" and at < len(record):
            record[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del record[at:]
        elif kind == "insert":
            record[at:at] = data.draw(st.binary(max_size=8))
        else:
            del record[at : at + data.draw(st.integers(1, 8))]
    decodes_to_something_usable(bytes(record))


Mutation = Callable[[np.random.Generator, list[bytes]], bytes]


def some_record(rng: np.random.Generator, records: list[bytes]) -> bytearray:
    return bytearray(records[rng.integers(len(records))])


def flipped(rng: np.random.Generator, records: list[bytes]) -> bytes:
    record = some_record(rng, records)
    for at in rng.integers(0, len(record), int(rng.integers(1, 9))):
        record[at] = rng.integers(256) if rng.random() < 0.5 else record[at] ^ (1 << int(rng.integers(8)))
    return bytes(record)


def truncated(rng: np.random.Generator, records: list[bytes]) -> bytes:
    record = some_record(rng, records)
    start, end = sorted(rng.integers(0, len(record) + 1, 2).tolist())
    return bytes(record[:end] if rng.random() < 0.7 else record[:start] + record[end:])


def spliced(rng: np.random.Generator, records: list[bytes]) -> bytes:
    one, other = some_record(rng, records), some_record(rng, records)
    at = int(rng.integers(0, len(one)))
    return bytes(one[:at] + other[at if rng.random() < 0.5 else int(rng.integers(0, len(other))) :])


HOSTILE_NUMBERS: list[Any] = [0, 1, -1, 2**31, 2**63, 2**64 - 1, -(2**63), 1e308, -1e308, 5e-324, -0.0]
HOSTILE_NUMBERS += [float("nan"), float("inf"), float("-inf"), True, None]
HOSTILE_VALUES: list[Any] = [*HOSTILE_NUMBERS, "", "x" * 400, b"", bytes(3), b"\xff" * 24, [], [1], {}]
HOSTILE_VALUES += [{"x": b""}, {"": float("nan")}, {b"x": 1.0}, {"x": {"x": {}}}]
ENTRIES = {"<i8": [-(2**63), 2**63 - 1], "<i4": [-(2**31), 2**31 - 1], "<i2": [-(2**15), 2**15 - 1]}
FLOATS = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e9, -1e9, -1.1e9, 1e-45, 1e-3, -0.0]


def with_another_field(rng: np.random.Generator, records: list[bytes]) -> bytes:
    """One field lost, of another type, of another size, or with an extreme entry; sometimes two."""
    content = msgpack.unpackb(bytes(some_record(rng, records)))
    for _ in range(int(rng.integers(1, 3))):
        name = list(content)[rng.integers(len(content))]
        kind = rng.random()
        if kind < 0.1:
            del content[name]
        elif kind < 0.4 or type(content[name]) is not bytes:
            content[name] = HOSTILE_VALUES[rng.integers(len(HOSTILE_VALUES))]
        elif kind < 0.5:
            length = int(rng.integers(0, 2 * len(content[name]) + 2))
            content[name] = (content[name] * 2 + bytes(2))[:length]
        else:
            content[name] = with_an_extreme_entry(rng, content[name])
    return bytes(msgpack.packb(content))


def with_an_extreme_entry(rng: np.random.Generator, raw: bytes) -> bytes:
    extremes: list[tuple[str, list[Any]]] = [*ENTRIES.items(), ("<f4", FLOATS), ("u1", [0, 1, 2, 255])]
    dtype, values = extremes[rng.integers(len(extremes))]
    size = np.dtype(dtype).itemsize
    if len(raw) < size:
        return raw
    at = int(rng.integers(len(raw) // size)) * size
    extreme = np.array([values[rng.integers(len(values))]], dtype).tobytes()
    return raw[:at] + extreme + raw[at + size :]


HUGE = [b"\xdb", b"\xc6", b"\xdd", b"\xdf", b"\xc9"]
"""Headers of a text, bytes, a list, a map and an extension whose size takes four bytes."""


def claiming_to_be_huge(rng: np.random.Generator, records: list[bytes]) -> bytes:
    record = some_record(rng, records)
    header = HUGE[rng.integers(len(HUGE))] + int(rng.integers(1 << 16, 1 << 32)).to_bytes(4, "big")
    at = int(rng.integers(0, len(record))) if rng.random() < 0.8 else 0
    return bytes(record[:at] + header + record[at + (5 if rng.random() < 0.5 else 0) :])


def nested_deeply(rng: np.random.Generator, records: list[bytes]) -> bytes:
    record = some_record(rng, records)
    level = [b"\x91", b"\x81\xa1x", b"\x81\xa6scores", b"\xdc\0\1", b"\x81"][rng.integers(5)]
    at = int(rng.integers(0, len(record))) if rng.random() < 0.5 else 0
    return bytes(record[:at] + level * int(rng.integers(2, 600)) + record[at:])


MUTATIONS: dict[Mutation, int] = {
    flipped: 25_000,
    truncated: 10_000,
    spliced: 15_000,
    with_another_field: 40_000,
    claiming_to_be_huge: 7_000,
    nested_deeply: 5_000,
}


def test_a_hundred_thousand_damaged_records_are_refused_or_usable_and_take_little_memory(
    make_episode: MakeEpisode,
) -> None:
    records = [
        encode_episode(make_episode(f"u{seed}", seed, num_tokens, dtype=dtype, fallback=fallback))
        for seed, (num_tokens, dtype, fallback) in enumerate(
            [
                (2, torch.bfloat16, "last"),
                (5, torch.float16, "first"),
                (9, torch.bfloat16, "first"),
                (0, torch.float16, "last"),
            ]
        )
    ]
    rng = np.random.default_rng(0)
    decodes_to_something_usable(records[2])  # whatever is loaded at the first use is loaded now
    peak_before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    usable = 0
    for mutate, count in MUTATIONS.items():
        for n in range(count):
            record = mutate(rng, records)
            if n % 50 == 0:  # tracing is slow
                tracemalloc.start()
            try:
                usable += decodes_to_something_usable(record)
            except Exception as error:
                raise AssertionError(f"{mutate.__name__} number {n}: {record!r}") from error
            if n % 50 == 0:
                _, peak_bytes = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                # Each level that is open takes a map, and there may be a thousand.
                assert peak_bytes < 8 * len(record) + (256 << 10), f"{mutate.__name__} number {n}"
    assert sum(MUTATIONS.values()) >= 100_000
    assert usable > 3000, "the mutations are so wild that nothing behind the first check was reached"
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before_kb
    assert grown_kb < 32 << 10


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=24),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(SMALL)), value=ANYTHING)
def test_a_field_with_any_other_value_never_raises_anything_else(name: str, value: Any) -> None:
    decodes_to_something_usable(msgpack.packb(SMALL | {name: value}))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    decodes_to_something_usable(data)
