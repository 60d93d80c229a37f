"""The one writer of a run's metrics: JSON lines always, Weights & Biases where it works."""

from __future__ import annotations

import json
import math
import netrc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from mara.deploy.config import RunConfig, WandbConfig
from mara.deploy.config_file import dump_config

METRICS_FILE = "metrics.jsonl"
GRADIENT_STEP = "learner/gradient_step"
EPISODES = "episodes/total"


class Recorder:
    """Writes records to ``metrics.jsonl`` in the run folder and to W&B. Called from one thread at a time.

    Failures of W&B are told once through ``say`` and end W&B, not the run.
    """

    def __init__(self, folder: Path, config: RunConfig, say: Callable[[str], None]) -> None:
        self._say = say
        self._began = time.time()
        self._lines = (folder / METRICS_FILE).open("a", encoding="utf-8")
        self._wandb_run: Any = None
        self._folder = folder
        self._config = config

    def start_wandb(self) -> None:
        """Begin the W&B run. Takes seconds; never asks anything."""
        mode = wandb_mode(self._config.wandb, os.environ)
        if mode == "disabled":
            return
        try:
            self._wandb_run = _start_wandb(self._folder, self._config, mode)
        except Exception as error:  # An outage of metrics must not stop the training.
            self._say(f"W&B is off: {_first_line(error)}")

    @property
    def wandb_folder(self) -> Path | None:
        """Where the offline run is; None if there is none."""
        runs = sorted((self._folder / "wandb").glob("offline-run-*"))
        return runs[-1] if runs else None

    def record(self, metrics: Mapping[str, float]) -> None:
        """Write one record: the metrics and ``time_s``, seconds since the run began.

        Values that are not finite become null in the file and are left out of W&B.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({"time_s": round(time.time() - self._began, 3), **finite})
        self._lines.write(line + "\n")
        self._lines.flush()
        self._to_wandb(lambda run: run.log({name: v for name, v in finite.items() if v is not None}))

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Add final results to the W&B run's summary."""
        self._to_wandb(lambda run: run.summary.update(dict(values)))

    def close(self) -> None:
        """Finish both; afterwards no W&B process is left. Does nothing twice."""
        self._lines.close()
        if self._wandb_run is not None:
            import wandb

            self._to_wandb(lambda run: run.finish())
            self._wandb_run = None
            wandb.teardown()

    def _to_wandb(self, act: Callable[[Any], object]) -> None:
        if self._wandb_run is None:
            return
        try:
            act(self._wandb_run)
        except Exception as error:  # An outage of metrics must not stop the training.
            self._wandb_run = None
            self._say(f"W&B is off from here: {_first_line(error)}; {METRICS_FILE} goes on")


def wandb_mode(config: WandbConfig, environment: Mapping[str, str]) -> str:
    """``online``, ``offline`` or ``disabled``; ``auto`` is online only where a login is found."""
    if config.mode != "auto":
        return config.mode
    if (asked := environment.get("WANDB_MODE")) in ("online", "offline", "disabled"):
        return asked
    return "online" if environment.get("WANDB_API_KEY") or _has_netrc_login(environment) else "offline"


def _has_netrc_login(environment: Mapping[str, str]) -> bool:
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(environment.get("NETRC", "~/.netrc")).expanduser()
    try:
        return host is not None and netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start_wandb(folder: Path, config: RunConfig, mode: str) -> Any:
    if mode == "offline":
        # Its service would report its own crashes over the network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    run = wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=folder.name,
        dir=folder,
        mode=mode,  # type: ignore[arg-type]
        config=yaml.safe_load(dump_config(config)),
        # Nothing on the terminal, no capture of it, no questions, no look at the code around.
        settings=wandb.Settings(
            silent=True, console="off", login_timeout=10, init_timeout=60, disable_git=True, disable_code=True
        ),
    )
    # Steps of our own: wandb drops what comes out of order of its own step.
    run.define_metric(GRADIENT_STEP)
    run.define_metric(EPISODES)
    run.define_metric("*", step_metric=GRADIENT_STEP)
    run.define_metric("episode/*", step_metric=EPISODES)
    return run


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
