"""Of a reward model that is no head, before it is loaded: whether it can be, and which one it is."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from mara.actors.config import LLMConfig
from mara.actors.reward_models.config import (
    CheckpointConfig,
    FunctionRewardConfig,
    HttpRewardConfig,
    RewardModelConfig,
    SequenceClassifierRewardConfig,
)
from mara.actors.reward_models.http import read_api_key
from mara.common.errors import UserError
from mara.deploy.model_shape import find_digest, find_folder

HTTP_CONNECT_S = 5.0
IMPORT_S = 120.0
WITHOUT_MEANING = {
    "weight", "batch_size", "timeout_s", "max_outage_s", "replicas", "num_cpus", "num_gpus", "num_threads",
    "device", "max_attempts", "retry_first_s", "api_key_env",
}  # fmt: skip
"""Settings that do not change what a score means."""


def check_reward_model(field: str, config: RewardModelConfig) -> dict[str, str]:
    """What identifies the reward model at ``field`` (``rewards.NAME``), which can be loaded.

    Returns SHA-256 by what it is of: the settings that a score depends on, and the file of a function or the
    files of a checkpoint.

    Raises:
        UserError: a folder, a module or a server is not there, or does not fit: field, value, remedy.
    """
    settings = json.dumps(reward_settings(config), sort_keys=True)
    digests = {"settings": hashlib.sha256(settings.encode()).hexdigest()}
    try:
        if isinstance(config, CheckpointConfig):
            _check_checkpoint(config)
            digests["model"] = find_digest(LLMConfig(model=config.model, revision=config.revision))
        elif isinstance(config, FunctionRewardConfig):
            file = _check_function(config, Path.cwd())
            digests["module"] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif isinstance(config, HttpRewardConfig):
            _check_server(config)
    except UserError as error:
        raise UserError(f"{field}.{error}") from error
    return digests


def reward_settings(config: RewardModelConfig) -> dict[str, Any]:
    """The settings that a score depends on, and the kind."""
    return config.model_dump(mode="json", exclude=WITHOUT_MEANING)


def _check_checkpoint(config: CheckpointConfig) -> None:
    from transformers import AutoConfig, AutoTokenizer

    from mara.actors.reward_models.checkpoint import check_chat_template, which_label

    try:
        torch.device("cpu" if config.device == "auto" else config.device)
    except RuntimeError as error:
        raise UserError(f"device={config.device} is not a device; use auto, cpu, cuda or cuda:N") from error
    folder = find_folder(LLMConfig(model=config.model, revision=config.revision), "")
    options: dict[str, Any] = {"trust_remote_code": False}
    try:
        described = AutoConfig.from_pretrained(folder, **options)
        if config.revision is not None:
            options["revision"] = config.revision
        tokenizer = AutoTokenizer.from_pretrained(str(Path(config.model).expanduser()), **options)
    except Exception as error:
        # Each library that reads them fails in ways of its own.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model: {config.model!r} cannot be used: {reason}") from error
    if isinstance(config, SequenceClassifierRewardConfig):
        which_label(config, described)
        check_chat_template(config, tokenizer)
    elif described.model_type != "llama":
        raise UserError(
            f"model: {config.model!r} is of type {described.model_type}, this kind has a Llama body; use "
            "kind=sequence_classifier, or another model"
        )


def _check_function(config: FunctionRewardConfig, folder: Path) -> Path:
    """The file of the function's module. It is imported, and the function called with two short answers, in
    a process of its own: it may bring in anything."""
    code = (
        "import sys; from pathlib import Path; from mara.actors.reward_models.function import try_function\n"
        "from mara.common.errors import UserError\n"
        "try: try_function(sys.argv[1], Path(sys.argv[2]))\n"
        "except UserError as error: sys.exit(f'\\n{error}')\n"
        "print('\\n' + sys.modules[sys.argv[1].partition(':')[0]].__file__)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, config.function, str(folder)],
            capture_output=True,
            text=True,
            timeout=IMPORT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"function: {config.function!r} is not imported and has not scored two short answers within "
            f"{IMPORT_S:g} s; do less there"
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"its import ended with status {done.returncode}"]
        raise UserError(lines[-1] if lines[-1].startswith("function: ") else f"function: {lines[-1]}")
    return Path(done.stdout.strip().splitlines()[-1])


def _check_server(config: HttpRewardConfig) -> None:
    read_api_key(config.api_key_env)
    parts = urlsplit(config.url)
    assert parts.hostname is not None, "the settings are checked"
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if any(os.environ.get(name) for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy")):
        return  # The server may be reached by way of another.
    try:
        socket.create_connection((parts.hostname, port), timeout=HTTP_CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"url: nothing answers at {parts.hostname}:{port} ({error}); start the server, or correct "
            "the address"
        ) from error
