"""Checkpoints: the learner's state as safetensors and JSON, written whole or not at all.

::

    checkpoints/
        step-00000400-episode-00000200/
            tensors.safetensors     networks, target, optimisers, random state
            state.json              everything else, and where each tensor belongs
        step-00000500-episode-00000250/
        latest -> step-00000500-episode-00000250

Episodes are not saved here: a learner that goes on from a checkpoint fills its ring from the log again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mara.common.errors import UserError

TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"
LATEST = "latest"
SCHEMA = 2
NUM_KEPT = 2
"""Checkpoints kept; older ones are deleted once a newer one is complete."""
TENSOR_KEY = "$tensor"
"""Stands in the JSON where a tensor belongs, with the tensor's name as its value."""


class Checkpointed(Protocol):
    """What can be saved: the learner."""

    @property
    def gradient_step(self) -> int: ...
    @property
    def num_episodes(self) -> int: ...
    def state_dict(self) -> dict[str, Any]:
        """Nested dictionaries with text keys; the leaves are tensors or what JSON can hold."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_checkpoint(folder: Path, learner: Checkpointed) -> Path:
    """Write a checkpoint below ``folder``, point ``latest`` to it and delete all but the last two.

    A reader, and a run that is killed at any moment, finds the previous checkpoint or this one. Where this
    gradient step and episode were saved already, nothing is written. Returns the checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{learner.gradient_step:08d}-episode-{learner.num_episodes:08d}"
    final = folder / name
    if not final.exists():
        tensors: dict[str, torch.Tensor] = {}
        state = _without_tensors(learner.state_dict(), "", tensors)
        partial = folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(tensors, partial / TENSORS_FILE)
        text = json.dumps({"schema": SCHEMA, "state": state}, indent=1, allow_nan=False)
        (partial / STATE_FILE).write_text(text + "\n")
        for path in (partial / TENSORS_FILE, partial / STATE_FILE, partial):
            _flush_to_disk(path)
        partial.rename(final)
    _point(folder / LATEST, name)
    for old in sorted(folder.glob("step-*"))[:-NUM_KEPT]:
        if old != final:
            shutil.rmtree(old)
    return final


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the state in the latest checkpoint below ``folder``, as ``state_dict`` gave it, on the CPU.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or another version wrote it.
    """
    latest = folder / LATEST
    if not latest.is_dir():
        raise UserError(f"checkpoint: {folder} has none; give the folder of a run that saved one")
    content = _parse(latest.resolve() / STATE_FILE, lambda path: json.loads(path.read_text()))
    tensors = _parse(latest.resolve() / TENSORS_FILE, load_file)
    if content["schema"] != SCHEMA:
        raise UserError(
            f"checkpoint: {latest.resolve()} has schema {content['schema']}, this version reads {SCHEMA}; "
            f"use the version that saved it"
        )
    state: dict[str, Any] = _with_tensors(content["state"], tensors)
    return state


def load_checkpoint(folder: Path, learner: Checkpointed) -> None:
    """Bring ``learner`` to the state of the latest checkpoint below ``folder``.

    Networks, target, optimisers, temperature, counters, the score normaliser's memory and the random state
    of the sampling come back. The ring does not: the learner fills it from the log when it runs.

    Raises:
        UserError: as :func:`read_checkpoint`, or the checkpoint belongs to networks of other sizes.
    """
    state = read_checkpoint(folder)
    try:
        learner.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"checkpoint: {(folder / LATEST).resolve()} does not fit agent.widths, learner.sac.critic_widths "
            f"or the LLM ({str(error).splitlines()[0]}); use the settings it was saved with"
        ) from error


def _parse(path: Path, parse: Callable[[Path], Any]) -> Any:
    try:
        return parse(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"checkpoint: {path} is damaged ({error}); point {LATEST} to the checkpoint beside it"
        ) from error


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


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
