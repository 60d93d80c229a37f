"""The one writer of a run's metrics: JSON lines always, Weights & Biases where it works."""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import yaml

from mara.common.addresses import hide_passwords
from mara.common.errors import UserError
from mara.common.files import write_whole
from mara.deploy.config import RunConfig, WandbConfig
from mara.deploy.config_file import dump_config

METRICS_FILE = "metrics.jsonl"
WANDB_HAS = "wandb-has.json"
"""How far records went that W&B has and ``metrics.jsonl`` has not any more."""
GRADIENT_STEP = "learner/gradient_step"
EPISODES = "episodes/total"

ONLINE_WITHIN_S = 10
MODES = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""Values of ``WANDB_MODE``, the old names too, and the mode each stands for."""


class Recorder:
    """Writes records to ``metrics.jsonl`` in the run folder and to W&B. Called from one thread at a time.

    Failures are told once through ``say``: they end the record, not the run. Where W&B cannot go online it
    goes offline.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        say: Callable[[str], None],
        wandb_id: str | None = None,
        goes_on_from: tuple[int, int] | None = None,
    ) -> None:
        """Open the record.

        Args:
            wandb_id: of the W&B run; one that is there already goes on.
            goes_on_from: gradient step and episodes of the checkpoint from which the run goes on. Records
                beyond are taken out of the file: they come again. W&B cannot take any back, so it keeps
                these, of every start so far, and is sent only what is further.
        """
        self._say = say
        self._wandb_id = wandb_id
        self._is_further_than: tuple[float, float] = (-1.0, -1.0)
        """The most gradient steps and episodes of any record that W&B has."""
        seconds = 0.0
        if goes_on_from is not None:
            seconds, self._is_further_than = cut_back(folder / METRICS_FILE, *goes_on_from)
        self._began = time.time() - seconds
        self._lines: TextIO | None = (folder / METRICS_FILE).open("a", encoding="utf-8")
        self._wandb_run: Any = None
        self._folder = folder
        self._config = config

    def start_wandb(self) -> None:
        """Begin the W&B run. Takes seconds; never asks anything."""
        mode = wandb_mode(self._config.wandb, os.environ)
        if mode == "disabled":
            return
        if mode == "online":
            try:
                self._wandb_run = _start_wandb(self._folder, self._config, mode, self._wandb_id)
                return
            except Exception as error:  # An outage of metrics must not stop the training.
                self._say(f"W&B is offline, `wandb sync` sends the run later: {_first_line(error)}")
        try:
            self._wandb_run = _start_wandb(self._folder, self._config, "offline", self._wandb_id)
        except Exception as error:  # The same.
            self._say(f"W&B is off: {_first_line(error)}")

    @property
    def wandb_folder(self) -> Path | None:
        """Where the offline run is; None if there is none."""
        runs = sorted((self._folder / "wandb").glob("offline-run-*"))
        return runs[-1] if runs else None

    def record(self, metrics: Mapping[str, float]) -> None:
        """Write one record: the metrics and ``time_s``, seconds that the run has gone on for.

        Values that are not finite become null in the file and are left out of W&B.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({"time_s": round(time.time() - self._began, 3), **finite})
        self._write(line + "\n")
        place = (metrics.get(GRADIENT_STEP, math.inf), metrics.get(EPISODES, math.inf))
        # Neither step of W&B's may go back.
        if place == self._is_further_than or place != _furthest(place, self._is_further_than):
            return
        self._to_wandb(lambda run: run.log({name: v for name, v in finite.items() if v is not None}))

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Add final results to the W&B run's summary."""
        self._to_wandb(lambda run: run.summary.update(dict(values)))

    def close(self) -> None:
        """Finish both; afterwards no W&B process is left. Does nothing twice."""
        self._close_lines()
        if self._wandb_run is not None:
            import wandb

            self._to_wandb(lambda run: run.finish())
            self._wandb_run = None
            wandb.teardown()

    def _write(self, line: str) -> None:
        if self._lines is None:
            return
        try:
            self._lines.write(line)
            self._lines.flush()
        except OSError as error:
            self._close_lines()
            self._say(f"{METRICS_FILE} ends here: {error.strerror or error}; the run goes on")

    def _close_lines(self) -> None:
        """Close the file; what a full disk did not take is lost."""
        lines, self._lines = self._lines, None
        if lines is not None:
            with contextlib.suppress(OSError):
                lines.close()

    def _to_wandb(self, act: Callable[[Any], object]) -> None:
        if self._wandb_run is None:
            return
        try:
            act(self._wandb_run)
        except Exception as error:  # An outage of metrics must not stop the training.
            self._wandb_run = None
            self._say(f"W&B is off from here: {_first_line(error)}; {METRICS_FILE} goes on")


def cut_back(path: Path, gradient_step: int, num_episodes: int) -> tuple[float, tuple[float, float]]:
    """Take the records beyond a checkpoint, and a last line that was not finished, out of ``metrics.jsonl``.

    Returns the ``time_s`` of the last one that stays, and the most gradient steps and episodes of any there
    were, also of those that were taken out before: :data:`WANDB_HAS` beside the file keeps them.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    kept: list[str] = []
    kept_by = path.with_name(WANDB_HAS)
    seconds, furthest = 0.0, _read_furthest(kept_by)
    for line in lines:
        try:
            record = json.loads(line)
            place = (float(record.get(GRADIENT_STEP, 0)), float(record.get(EPISODES, 0)))
            time_s = float(record["time_s"])
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        furthest = _furthest(place, furthest)
        if place[0] <= gradient_step and place[1] <= num_episodes and line.endswith("\n"):
            kept.append(line)
            seconds = time_s
    if len(kept) < len(lines):
        write_whole(kept_by, json.dumps(furthest) + "\n")  # first: nothing else tells it afterwards
        write_whole(path, "".join(kept))
    return seconds, furthest


def _furthest(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return max(one[0], other[0]), max(one[1], other[1])


def _read_furthest(path: Path) -> tuple[float, float]:
    try:
        gradient_step, num_episodes = json.loads(path.read_text())
        return float(gradient_step), float(num_episodes)
    except (OSError, ValueError, TypeError):  # nothing was taken out yet
        return -1.0, -1.0


def wandb_mode(config: WandbConfig, environment: Mapping[str, str]) -> str:
    """``online``, ``offline`` or ``disabled``; ``auto``: what ``WANDB_MODE`` says, else online with a login.

    Raises:
        UserError: ``WANDB_MODE`` has a value without a meaning.
    """
    if config.mode != "auto":
        return config.mode
    if asked := environment.get("WANDB_MODE"):
        if asked not in MODES:
            raise UserError(f"WANDB_MODE={asked}: allowed are {', '.join(MODES)}; or set wandb.mode=offline")
        return MODES[asked]
    return "online" if _has_login(environment) else "offline"


def check_wandb(config: WandbConfig, environment: Mapping[str, str]) -> None:
    """Refuse a run that wants to be online without a login: nobody is there to be asked for one.

    Raises:
        UserError: there is no login, or the mode is none.
    """
    if wandb_mode(config, environment) == "online" and not _has_login(environment):
        asked = f" (WANDB_MODE={environment.get('WANDB_MODE')})" if config.mode == "auto" else ""
        raise UserError(
            f"wandb.mode={config.mode}{asked}: there is no W&B login for {_base_url(environment)}; run "
            "`wandb login`, set WANDB_API_KEY, or use wandb.mode=offline"
        )


def _has_login(environment: Mapping[str, str]) -> bool:
    named = environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE")
    return bool(named) or _has_netrc_login(environment)


def _base_url(environment: Mapping[str, str]) -> str:
    return environment.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _has_netrc_login(environment: Mapping[str, str]) -> bool:
    path = Path(environment.get("NETRC") or "~/.netrc").expanduser()
    try:
        host = urlsplit(_base_url(environment)).hostname
        return host is not None and netrc.netrc(path).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def _start_wandb(folder: Path, config: RunConfig, mode: str, wandb_id: str | None) -> Any:
    # Decided already; the library would refuse values that it does not know.
    os.environ.pop("WANDB_MODE", None)
    # Without it the library asks on a terminal for a login that is missing or was refused.
    os.environ["WANDB_SILENT"] = "true"
    if mode == "offline":
        # Its service would report its own crashes over the network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Not needed, and one that was refused would be refused again.
        os.environ.pop("WANDB_API_KEY", None)
    import wandb

    try:
        run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=folder.name,
            id=wandb_id,
            resume=None if wandb_id is None else "allow",
            dir=folder,
            mode=mode,  # type: ignore[arg-type]
            config=yaml.safe_load(dump_config(config)),
            # Nothing on the terminal, no capture of it, no questions. Nothing of the machine, the code or the
            # command line, which may hold a password: the run consists of its settings and its metrics.
            settings=wandb.Settings(
                silent=True,
                console="off",
                login_timeout=10,
                init_timeout=ONLINE_WITHIN_S,
                disable_git=True,
                disable_code=True,
                disable_job_creation=True,
                save_code=False,
                host="",
                program="mara",
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
    except Exception:
        # Its service keeps the settings of this attempt.
        with contextlib.suppress(Exception):
            wandb.teardown()
        raise
    # Steps of our own: wandb drops what comes out of order of its own step.
    run.define_metric(GRADIENT_STEP)
    run.define_metric(EPISODES)
    run.define_metric("*", step_metric=GRADIENT_STEP)
    run.define_metric("episode/*", step_metric=EPISODES)
    return run


def _first_line(error: Exception) -> str:
    return hide_passwords((str(error).strip() or type(error).__name__).splitlines()[0])
