"""Checkpoints: the learner's state as safetensors and JSON, written whole or not at all.

::

    checkpoints/
        step-00000400-episode-00000200/
            tensors.safetensors     networks, target, optimisers, random state, rewards of the ring
            state.json              everything else, and where each tensor belongs
            SHA256SUMS              of both, as `sha256sum -c` reads it
        step-00000500-episode-00000250/
        latest -> step-00000500-episode-00000250

Episodes are not saved here: a learner that goes on from a checkpoint fills its ring from the log again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from mara.common.errors import UserError
from mara.common.files import flush_to_disk, readable

TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"
SUMS_FILE = "SHA256SUMS"
LATEST = "latest"
SET_ASIDE = "not-used"
"""What the names of checkpoints begin with that are newer than the one a run went on from."""
SCHEMA = 3
TENSOR_KEY = "$tensor"
"""Stands in the JSON where a tensor belongs, with the tensor's name as its value."""

_log = logging.getLogger(__name__)


class Checkpointed(Protocol):
    """What can be saved: the learner, or a copy of how it was."""

    @property
    def gradient_step(self) -> int: ...
    @property
    def num_episodes(self) -> int: ...
    def state_dict(self) -> dict[str, Any]:
        """Nested dictionaries with text keys; the leaves are tensors or what JSON can hold."""
        ...


class Restored(Protocol):
    """What can go on from a checkpoint: the learner."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class DamagedCheckpoint(Exception):
    """A file of a checkpoint is missing or is not the one that was written; the message names it."""


def save_checkpoint(folder: Path, learner: Checkpointed, num_kept: int = 2) -> Path:
    """Write a checkpoint below ``folder``, point ``latest`` to it and delete all but the ``num_kept`` newest.

    A reader, and a run that is killed at any moment, finds the previous checkpoint or this one. Where this
    gradient step and episode were saved already, nothing is written. Returns the checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{learner.gradient_step:08d}-episode-{learner.num_episodes:08d}"
    final = folder / name
    if not final.exists():
        for abandoned in folder.glob(".*.partial"):
            shutil.rmtree(abandoned, ignore_errors=True)
        tensors: dict[str, torch.Tensor] = {}
        state = _without_tensors(learner.state_dict(), "", tensors)
        partial = folder / f".{name}.partial"
        partial.mkdir()
        with readable(partial / TENSORS_FILE):
            save_file(tensors, partial / TENSORS_FILE)
        text = json.dumps({"schema": SCHEMA, "state": state}, indent=1, allow_nan=False)
        (partial / STATE_FILE).write_text(text + "\n")
        files = (TENSORS_FILE, STATE_FILE)
        (partial / SUMS_FILE).write_text("".join(f"{_sha256(partial / file)}  {file}\n" for file in files))
        for path in (*(partial / file for file in (*files, SUMS_FILE)), partial):
            flush_to_disk(path)
        partial.rename(final)
        flush_to_disk(folder)
    _point(folder / LATEST, name)
    for old in _in(folder)[:-num_kept]:
        if old != final:
            try:
                shutil.rmtree(old)
            except OSError as error:  # As where somebody reads it on NFS: tried again with the next one.
                _log.warning("the checkpoint %s could not be removed (%s)", old, error.strerror or error)
    return final


def find_checkpoint(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint below ``folder``, from ``latest`` on, whose files are as they were written.

    ``warn`` is told of each damaged one that was passed over. None: none was saved.

    Raises:
        UserError: all are damaged, or another version wrote it.
    """
    newest = (folder / LATEST).resolve().name
    found = _in(folder)[::-1]
    if newest != LATEST:  # A person may have pointed it to an older one; without it all are looked at.
        older = [path for path in found if path.name <= newest]
        if found and not older:
            raise UserError(
                f"checkpoint: {folder / LATEST} points to {newest}, which is none of the step-* beside it; "
                f"point it to one of them, such as {found[0].name}"
            )
        found = older
    reasons: list[str] = []
    for path in found:
        try:
            _check(path)
        except DamagedCheckpoint as damage:
            reasons.append(str(damage))
        else:
            _read_state(path)
            for reason in reasons:
                warn(f"checkpoint: {reason}; {path.name}, the one before, is used")
            return path
    if reasons:
        raise UserError(f"checkpoint: {reasons[0]}, and no other one is sound; start a new run")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state in the checkpoint ``path``, as ``state_dict`` gave it, on the CPU.

    Raises:
        UserError: it is damaged, or another version wrote it.
    """
    try:
        _check(path)
    except DamagedCheckpoint as damage:
        raise UserError(f"checkpoint: {damage}; use another one") from damage
    # Copies: what is read is mapped from the file, whose space would not be freed while it is in use, and
    # which could not be deleted on NFS.
    tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS_FILE).items()}
    state: dict[str, Any] = _with_tensors(_read_state(path), tensors)
    return state


def load_checkpoint(path: Path, learner: Restored) -> None:
    """Bring ``learner`` to the state of the checkpoint ``path``.

    Networks, target, optimisers, temperature, counters, the limiter, the score normaliser's memory, what the
    ring knows of its episodes and the random state of the sampling come back. The episodes themselves do
    not: the learner fills the ring from the log when it runs.

    Raises:
        UserError: as :func:`read_checkpoint`, or the checkpoint belongs to networks of other sizes.
    """
    state = read_checkpoint(path)
    try:
        learner.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"checkpoint: {path} does not fit agent.widths, learner.sac.critic_widths "
            f"or the LLM ({str(error).splitlines()[0]}); use the settings it was saved with"
        ) from error


def set_newer_aside(path: Path, num_kept: int = 2) -> None:
    """Rename the checkpoints beside ``path`` that are newer, and point ``latest`` to ``path``.

    For a run that goes on from there: what it saves next may be at the same step as one of them. Of those
    set aside, now and before, the ``num_kept`` that were written last stay.
    """
    for other in _in(path.parent):
        if other.name > path.name:
            aside = other.with_name(f"{SET_ASIDE}-{other.name}")
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
    _point(path.with_name(LATEST), path.name)
    set_aside = sorted(path.parent.glob(f"{SET_ASIDE}-*"), key=lambda other: other.stat().st_mtime_ns)
    for old in set_aside[:-num_kept]:
        shutil.rmtree(old, ignore_errors=True)


def _in(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first; copies and archives that a person put there are none."""
    return sorted(
        path
        for path in folder.glob("step-*")
        if path.is_dir() and re.fullmatch(r"step-\d+-episode-\d+", path.name)
    )


def _check(path: Path) -> None:
    """The files of the checkpoint ``path`` are those that were written.

    Raises:
        DamagedCheckpoint: one is not.
    """
    try:
        lines = (path / SUMS_FILE).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path / SUMS_FILE} cannot be read") from error
    for file in (TENSORS_FILE, STATE_FILE):
        try:
            is_sound = f"{_sha256(path / file)}  {file}" in lines
        except OSError as error:
            raise DamagedCheckpoint(f"{path / file} cannot be read ({error.strerror})") from error
        if not is_sound:
            raise DamagedCheckpoint(f"{path / file} is damaged (its checksum differs)")


def _read_state(path: Path) -> Any:
    """The state in the checkpoint ``path``, which is sound, with names in place of its tensors.

    Raises:
        UserError: another version wrote it.
    """
    content = json.loads((path / STATE_FILE).read_text())
    if content["schema"] != SCHEMA:
        raise UserError(
            f"checkpoint: {path} has schema {content['schema']}, this version reads {SCHEMA}; "
            f"use the version that saved it"
        )
    return content["state"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_tensors(node: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Copy a nested state with each tensor replaced by its name, and put the tensors into ``tensors``.

    The name is the JSON pointer (RFC 6901) to the tensor's place.
    """
    if isinstance(node, torch.Tensor):
        tensors[path] = node.detach().cpu().contiguous()
        return {TENSOR_KEY: path}
    if isinstance(node, dict):
        pointers = {key: f"{path}/{key.replace('~', '~0').replace('/', '~1')}" for key in node}
        return {key: _without_tensors(value, pointers[key], tensors) for key, value in node.items()}
    return node


def _with_tensors(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Undo :func:`_without_tensors`."""
    if not isinstance(node, dict):
        return node
    if TENSOR_KEY in node:
        return tensors[node[TENSOR_KEY]]
    return {key: _with_tensors(value, tensors) for key, value in node.items()}


def _point(link: Path, name: str) -> None:
    partial = link.with_name(f".{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(name)
    partial.replace(link)
