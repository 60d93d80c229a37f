"""The wire format of an episode: one msgpack map with a schema number and raw little-endian arrays.

::

    {"schema": 1, "uid": …, "prompt_id": …, "actor_id": …, "finish_reason": "eos" | "length",
     "started_at_s": …, "finished_at_s": …, "scores": {name: …}, "prefix_scores": {name: bytes of N × 4},
     "hidden_size": D, "states_dtype": "bfloat16" | "float16", "states_TD": bytes of T × D × 2,
     and the other arrays of the episode record as bytes under their own names}

The states come last, so that both sides handle them where they lie: they are sent from the memory of the
episode, and read in that of the record.

Decoding trusts nothing: a record comes out as an episode that shaping and training can use, or as
:class:`MalformedRecord`. No pickle, no extension types, no arrays of objects.
Legend: P prompt tokens, N response tokens, T decisions, D hidden size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import msgpack  # type: ignore[import-untyped]
import numpy as np
import torch

from mara.common.agent import ACCEPT
from mara.common.episode import Episode, FinishReason

SCHEMA = 1

_ARRAYS: dict[str, np.dtype[Any]] = {
    "prompt_ids_P": np.dtype("<i4"),
    "response_ids_N": np.dtype("<i4"),
    "actions_T": np.dtype("u1"),
    "ranks_T": np.dtype("<i2"),
    "num_candidates_T": np.dtype("<i2"),
    "positions_T": np.dtype("<i4"),
    "forced_T": np.dtype("?"),
    "reference_logprobs_T": np.dtype("<f4"),
    "accept_logprobs_T": np.dtype("<f4"),
    "reject_logprobs_T": np.dtype("<f4"),
    "policy_versions_T": np.dtype("<i8"),
}
_PREFIX_SCORES = np.dtype("<f4")
_TEXTS = ("uid", "prompt_id", "actor_id", "finish_reason", "states_dtype")
_TIMES = ("started_at_s", "finished_at_s")
_FIELDS = {"schema", "scores", "prefix_scores", "hidden_size", "states_TD", *_ARRAYS, *_TEXTS, *_TIMES}
_STATES_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_STATES_KEY = b"\xa9states_TD"
_BIN32_BYTES = 5
_LENGTH_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
"""First byte of bytes in msgpack → how many bytes their length has."""
_PIECE_BYTES = 1 << 14
"""Of a record, read at a time; the states are not among them."""
# The record, its scores and its prefix scores.
_MAPS = 3
# Log-probabilities may exceed 0 by the rounding of a log-softmax.
_ROUNDING = 1e-3
# Scores and log-probabilities beyond this would overflow when they are added up.
_LARGEST = 1e9


class MalformedRecord(Exception):
    """A record is not an episode; one line says why."""


@dataclass(frozen=True, slots=True)
class RecordLimits:
    """Sizes beyond which a record is refused, before memory is spent on it."""

    max_record_bytes: int = 256 << 20
    max_tokens: int = 1 << 20
    """Of the prompt, and of the response."""
    max_decisions: int = 1 << 20
    max_hidden_size: int = 1 << 16
    max_scores: int = 64
    max_text_bytes: int = 512
    """Of an id or a name."""


def encode_episode(episode: Episode) -> bytes:
    """Return the record of an episode.

    Raises:
        ValueError: an array has another dtype than the episode record says.
    """
    return b"".join(encode_in_parts(episode))


def encode_in_parts(episode: Episode) -> tuple[bytes, memoryview]:
    """Return the record of an episode as two parts: the second is the memory of its states.

    The states are by far the largest part, and the last. Fresh memory of a record's size costs several times
    the copy into it, so whoever can send parts should.

    Raises:
        ValueError: an array has another dtype than the episode record says.
    """
    record, states = _fields(episode)
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(len(record) + 1)
    for name, value in record.items():
        packer.pack(name)
        packer.pack(value)
    head = packer.bytes()
    # A text may be written with one byte for its length or without: the states then begin at an even place,
    # where whoever reads them needs no copy.
    is_odd = (len(head) + len(_STATES_KEY) + _BIN32_BYTES) % 2
    key = b"\xd9\x09" + _STATES_KEY[1:] if is_odd else _STATES_KEY
    return head + key + b"\xc6" + len(states).to_bytes(4, "big"), states  # bin 32


def _fields(episode: Episode) -> tuple[dict[str, Any], memoryview]:
    """All fields but the states, and the states' memory."""
    states_TD = episode.states_TD.detach().cpu().contiguous()
    names = {dtype: name for name, dtype in _STATES_DTYPES.items()}
    if states_TD.dtype not in names:
        raise ValueError(f"states_TD is {states_TD.dtype}; an episode holds bfloat16 or float16")
    record: dict[str, Any] = {"schema": SCHEMA}
    for name in ("uid", "prompt_id", "actor_id", "finish_reason"):
        record[name] = getattr(episode, name)
    for name in _TIMES:
        record[name] = float(getattr(episode, name))
    record["scores"] = {name: float(score) for name, score in episode.scores.items()}
    record["prefix_scores"] = {
        name: _to_bytes(f"prefix_scores {name}", array, _PREFIX_SCORES)
        for name, array in episode.prefix_scores.items()
    }
    for name, dtype in _ARRAYS.items():
        record[name] = _to_bytes(name, getattr(episode, name), dtype)
    record["hidden_size"] = states_TD.shape[1]
    record["states_dtype"] = names[states_TD.dtype]
    states = states_TD.view(torch.int16).numpy().astype("<i2", copy=False)
    return record, states.reshape(-1).data.cast("B")


def _to_bytes(name: str, array: np.ndarray, dtype: np.dtype[Any]) -> bytes:
    if array.dtype != dtype.newbyteorder("="):
        raise ValueError(f"{name} is {array.dtype}; an episode holds {dtype.newbyteorder('=')}")
    return np.ascontiguousarray(array, dtype).tobytes()


def decode_episode(data: bytes | bytearray, limits: RecordLimits | None = None) -> Episode:
    """Return the episode of a record.

    Its states are those in the memory of ``data``, which they keep alive; they must not be written, nor must
    ``data``, which may be shared by whoever has it. Only where they begin at an odd place they are a copy.
    The other arrays are small, and read-only.

    Raises:
        MalformedRecord: whatever is wrong with ``data``; no other exception.
    """
    limits = limits or RecordLimits()
    fields = _unpack(data, limits)
    schema = fields.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        raise MalformedRecord(f"unknown schema {_shown(schema)}; this version reads schema {SCHEMA}")
    if missing := _FIELDS - fields.keys():
        raise MalformedRecord(f"field {min(missing)} is missing")
    if unknown := fields.keys() - _FIELDS:
        raise MalformedRecord(f"field {_shown(min(unknown, key=str))} is not known")
    texts = {name: _typed(fields, name, str) for name in _TEXTS}
    if texts["finish_reason"] not in get_args(FinishReason):
        raise MalformedRecord(f"finish_reason {_shown(texts['finish_reason'])} is neither eos nor length")
    if not texts["uid"]:
        raise MalformedRecord("uid is empty")
    arrays = {name: _array(fields, name, dtype) for name, dtype in _ARRAYS.items()}
    _check_sizes(arrays, limits)
    _check_decisions(arrays)
    states_TD = _states(fields, texts.pop("states_dtype"), len(arrays["actions_T"]), limits)
    parts: dict[str, Any] = {**texts, **arrays}
    parts |= {name: _finite(name, fields[name]) for name in _TIMES}
    scores = _scores(fields, limits)
    prefix_scores = _prefix_scores(fields, len(arrays["response_ids_N"]), limits)
    return Episode(**parts, states_TD=states_TD, scores=scores, prefix_scores=prefix_scores)


class _Pieces:
    """The rest of a record as a file that is read in pieces."""

    def __init__(self, rest: memoryview) -> None:
        self._rest = rest

    def read(self, num_bytes: int) -> bytes:
        piece, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return bytes(piece)


def _unpack(data: bytes | bytearray, limits: RecordLimits) -> dict[str, Any]:
    """The fields of a record; the states, if they are bytes, as a view of them where they lie."""
    if len(data) > limits.max_record_bytes:
        raise MalformedRecord(f"record has {len(data)} bytes, more than {limits.max_record_bytes}")
    num_maps = 1  # the record

    def count(one: dict[Any, Any]) -> dict[Any, Any]:
        # Called as each map ends, the innermost first. An empty one takes twenty times its bytes in the
        # record: maps within maps must not be unpacked to the end.
        nonlocal num_maps
        num_maps += 1
        if num_maps > _MAPS:
            raise ValueError("more maps than a record has")
        return one

    most_entries = max(len(_FIELDS), limits.max_scores)
    view = memoryview(data)

    def unpacker_from(place: int) -> Any:
        return msgpack.Unpacker(
            _Pieces(view[place:]),
            read_size=_PIECE_BYTES,
            max_buffer_size=limits.max_record_bytes + _PIECE_BYTES,
            object_hook=count,
            strict_map_key=True,
            max_str_len=limits.max_text_bytes,
            max_bin_len=limits.max_record_bytes,
            max_map_len=most_entries,
            max_array_len=0,
            max_ext_len=0,
        )

    try:
        return _unpack_fields(view, unpacker_from, most_entries)
    except (ValueError, msgpack.UnpackException) as error:
        raise MalformedRecord(f"not a msgpack record ({_line(error)})") from error


def _unpack_fields(
    view: memoryview, unpacker_from: Callable[[int], Any], most_entries: int
) -> dict[str, Any]:
    """Unpack the map that a record is; ``unpacker_from`` makes an unpacker of what lies from a place on."""
    if not view or not (view[0] >> 4 == 0x8 or view[0] in (0xDE, 0xDF)):
        raise ValueError("it does not begin as a map")
    start, unpacker = 0, unpacker_from(0)
    num_entries = unpacker.read_map_header()
    if num_entries > most_entries:
        raise ValueError(f"{num_entries} entries, more than {most_entries}")
    fields: dict[str, Any] = {}
    for _ in range(num_entries):
        name = unpacker.unpack()
        if type(name) is not str:
            raise ValueError(f"{_shown(name)} is no name of a field")
        if name == "states_TD" and (states := _bytes_at(view, start + unpacker.tell())) is not None:
            fields[name], start = states
            unpacker = unpacker_from(start)
        else:
            fields[name] = unpacker.unpack()
    if (end := start + unpacker.tell()) != len(view):
        raise ValueError(f"{len(view) - end} bytes more than a record")
    return fields


def _bytes_at(view: memoryview, place: int) -> tuple[memoryview, int] | None:
    """The bytes that are packed at a place of a record, and where they end; None if that is no bytes.

    Raises:
        ValueError: they are longer than what is left of the record.
    """
    first = view[place] if place < len(view) else None
    if first not in _LENGTH_BYTES:
        return None
    begin = place + 1 + _LENGTH_BYTES[first]
    end = begin + int.from_bytes(view[place + 1 : begin], "big")
    if end > len(view):
        raise ValueError("it ends within states_TD")
    return view[begin:end], end


def _array(fields: dict[str, Any], name: str, dtype: np.dtype[Any]) -> np.ndarray:
    raw: bytes = _typed(fields, name, bytes)
    if len(raw) % dtype.itemsize:
        raise MalformedRecord(f"{name} has {len(raw)} bytes, not a multiple of {dtype.itemsize}")
    if dtype.kind == "b":
        if raw.strip(b"\0\1"):
            raise MalformedRecord(f"{name} holds something else than 0 and 1")
        return np.frombuffer(raw, np.bool_)
    return np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="), copy=False)


def _check_sizes(arrays: dict[str, np.ndarray], limits: RecordLimits) -> None:
    num_decisions = len(arrays["actions_T"])
    for name, array in arrays.items():
        if name.endswith("_T") and len(array) != num_decisions:
            raise MalformedRecord(f"{name} has {len(array)} entries, actions_T has {num_decisions}")
        bound = limits.max_decisions if name.endswith("_T") else limits.max_tokens
        if len(array) > bound:
            raise MalformedRecord(f"{name} has {len(array)} entries, more than {bound}")


def _check_decisions(arrays: dict[str, np.ndarray]) -> None:
    """Every value in its range, and the decisions in an order in which they can be taken (Eq. 5)."""
    accepted_T = arrays["actions_T"] == ACCEPT
    forced_T, positions_T, ranks_T = arrays["forced_T"], arrays["positions_T"], arrays["ranks_T"]
    accept_logprobs_T, reject_logprobs_T = arrays["accept_logprobs_T"], arrays["reject_logprobs_T"]
    for name in ("prompt_ids_P", "response_ids_N"):
        _require(arrays[name] >= 0, name, "holds a negative token id")
    _require(arrays["actions_T"] <= 1, "actions_T", "holds something else than 0 and 1")
    _require(arrays["num_candidates_T"] >= 2, "num_candidates_T", "holds a set of fewer than 2 candidates")
    _require((ranks_T >= 0) & (ranks_T < arrays["num_candidates_T"]), "ranks_T", "is outside its set")
    _require(
        (positions_T >= 0) & (positions_T < len(arrays["response_ids_N"])),
        "positions_T",
        "is outside the response",
    )
    _require(accepted_T[-1:], "actions_T", "ends with a rejection")
    _require(accepted_T | ~forced_T, "actions_T", "rejects where acceptance was forced")
    _check_order(accepted_T, arrays)
    for name in ("reference_logprobs_T", "accept_logprobs_T"):
        _require(_is_logprob(arrays[name]), name, "holds something else than finite log-probabilities")
    _require(~forced_T | (accept_logprobs_T == 0), "accept_logprobs_T", "is not 0 where forced")
    _require(
        np.where(forced_T, reject_logprobs_T == -np.inf, _is_logprob(reject_logprobs_T)),
        "reject_logprobs_T",
        "holds something else than log-probabilities, and -inf exactly where forced",
    )


def _check_order(accepted_T: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    """The candidates of a position come from one set and in its order, up to the first acceptance.

    The last candidate may be forced. Where it was free and rejected, the first one is forced in its place.
    """
    ranks_T, num_candidates_T, forced_T = arrays["ranks_T"], arrays["num_candidates_T"], arrays["forced_T"]
    moves_T = np.diff(arrays["positions_T"])
    _require(
        np.where(accepted_T[:-1], moves_T > 0, moves_T == 0),
        "positions_T",
        "does not advance exactly at the acceptances",
    )
    opens_T = np.append(True, accepted_T[:-1])[: len(accepted_T)]  # the first decision of its position
    is_last_T = ranks_T == num_candidates_T - 1
    falls_back_T = forced_T & (ranks_T == 0) & ~opens_T & _rolled(is_last_T)
    expected_ranks_T = np.where(opens_T, 0, _rolled(ranks_T) + 1)
    _require(
        opens_T | (num_candidates_T == _rolled(num_candidates_T)),
        "num_candidates_T",
        "changes within a position",
    )
    _require((ranks_T == expected_ranks_T) | falls_back_T, "ranks_T", "does not follow the candidates' order")
    _require(~forced_T | is_last_T | falls_back_T, "forced_T", "forces a candidate that is not the last")


def _rolled(values_T: np.ndarray) -> np.ndarray:
    """Each entry at the place of the next, the last at the first: a quicker :func:`numpy.roll`."""
    return np.concatenate([values_T[-1:], values_T[:-1]])


def _is_logprob(values: np.ndarray) -> np.ndarray:
    result: np.ndarray = (values >= -_LARGEST) & (values <= _ROUNDING)
    return result


def _require(holds: np.ndarray, name: str, what: str) -> None:
    if not holds.all():
        raise MalformedRecord(f"{name} {what} (entry {int(np.argmin(holds))})")


def _states(
    fields: dict[str, Any], dtype_name: str, num_decisions: int, limits: RecordLimits
) -> torch.Tensor:
    hidden_size = _typed(fields, "hidden_size", int)
    if not 1 <= hidden_size <= limits.max_hidden_size:
        raise MalformedRecord(f"hidden_size {hidden_size} is outside 1..{limits.max_hidden_size}")
    if dtype_name not in _STATES_DTYPES:
        raise MalformedRecord(f"states_dtype {_shown(dtype_name)} is not one of {', '.join(_STATES_DTYPES)}")
    dtype = _STATES_DTYPES[dtype_name]
    raw: memoryview = fields["states_TD"]
    if type(raw) is not memoryview:
        raise MalformedRecord(f"states_TD is {_shown(raw)}, not bytes")
    if len(raw) != num_decisions * hidden_size * 2:
        raise MalformedRecord(
            f"states_TD has {len(raw)} bytes, {num_decisions} decisions of size {hidden_size} take "
            f"{num_decisions * hidden_size * 2}"
        )
    bits = np.frombuffer(raw, "<i2")
    if not bits.flags.aligned or sys.byteorder == "big":
        bits = bits.astype(np.int16)
    bits_TD = np.asarray(_Writable(bits.reshape(num_decisions, hidden_size)))
    states_TD = torch.from_numpy(bits_TD).view(dtype)
    # The extremes carry a NaN, and take one pass without memory of its own.
    if num_decisions and not all(extreme.isfinite() for extreme in states_TD.aminmax()):
        raise MalformedRecord("states_TD holds infinities or not-a-numbers")
    return states_TD


class _Writable:
    """Read-only memory for torch, which has no such tensors and warns of arrays that it should not write.

    A writable copy of the states would cost more than all the rest of decoding.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # holds the memory
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _scores(fields: dict[str, Any], limits: RecordLimits) -> dict[str, float]:
    scores: dict[Any, Any] = _typed(fields, "scores", dict)
    if len(scores) > limits.max_scores:
        raise MalformedRecord(f"scores has {len(scores)} entries, more than {limits.max_scores}")
    for name, score in scores.items():
        if type(name) is not str:
            raise MalformedRecord(f"scores has the name {_shown(name)}, which is not text")
        if abs(_finite(f"score {_shown(name)}", score)) > _LARGEST:
            raise MalformedRecord(f"score {_shown(name)} is {score}, beyond {_LARGEST:g}")
    return scores


def _prefix_scores(fields: dict[str, Any], num_tokens: int, limits: RecordLimits) -> dict[str, np.ndarray]:
    raw: dict[Any, Any] = _typed(fields, "prefix_scores", dict)
    if len(raw) > limits.max_scores:
        raise MalformedRecord(f"prefix_scores has {len(raw)} entries, more than {limits.max_scores}")
    arrays = {}
    for key in raw:
        if type(key) is not str:
            raise MalformedRecord(f"prefix_scores has the name {_shown(key)}, which is not text")
        values_N = _array(raw, key, _PREFIX_SCORES)
        what = f"prefix_scores {_shown(key)}"
        if len(values_N) != num_tokens:
            raise MalformedRecord(f"{what} has {len(values_N)} entries, the response has {num_tokens} tokens")
        _require(np.abs(values_N) <= _LARGEST, what, "holds something else than moderate numbers")
        arrays[key] = values_N
    return arrays


def _finite(name: str, value: Any) -> float:
    if type(value) is not float or not math.isfinite(value):
        raise MalformedRecord(f"{name} is {_shown(value)}, not a finite float")
    return value


def _typed(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields[name]
    if type(value) is not kind:
        raise MalformedRecord(f"{name} is {_shown(value)}, not {kind.__name__}")
    return value


def _shown(value: Any) -> str:
    """A value from a record as part of one line: short, and without control characters."""
    if isinstance(value, (bytes, memoryview, dict)):
        return f"{type(value).__name__} of length {len(value)}"
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"


def _line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:120]
