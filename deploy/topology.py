"""Where the processes of a run are: the Ray cluster, and a handle on each actor in it.

Thin on purpose. Episodes and weights travel through Redis; Ray places processes, says when one died and
carries one small report a second. No call here waits for a process that hangs.

Importing this imports Ray, which then reads its environment: :mod:`mara.deploy.ray_head` sets that first.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import AuthenticationError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from mara.common.contracts import Conversation
from mara.common.errors import UserError
from mara.deploy.comparison.host import ComparisonHost
from mara.deploy.comparison.host import HostSpec as ComparisonSpec
from mara.deploy.config import RunConfig
from mara.deploy.learner_host import LearnerHost, LearnerSpec
from mara.deploy.process import RUNNING, Ended, Report
from mara.deploy.reward_host import RewardHost, RewardSpec
from mara.deploy.rollout_host import RolloutHost, RolloutSpec

NAMESPACE = "mara"
# run, report and stop must not wait for one another.
THREADS_PER_HOST = 4
CONNECT_S = 5.0
HTTP2_SETTINGS = 4
"""The type of the frame that both sides send first."""
ASK_S = 0.5
"""How often a process that loads is asked whether it has done so, seconds."""

DEATHS = (RayActorError, OutOfMemoryError)
"""What a call to a process raises that has died: the second where Ray ended it, as memory ran out."""

logger = logging.getLogger(__name__)


class Handle:
    """One placed process: its ``run`` in progress, and its last report."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self.report: Report | None = None
        """The last one that came."""
        self.heard = False
        """Whether the last :meth:`poll` found a new report."""
        self._actor = actor
        self._run = actor.run.remote()
        self._pending = actor.report.remote()
        self._rows: list[dict[str, Any]] = []

    def poll(self) -> Ended | None:
        """Take over a report that has come and ask for the next one; say how ``run`` ended, if it did.

        Returns at once.
        """
        self.heard = _is_ready(self._pending)
        if self.heard:
            try:
                self.report = ray.get(self._pending)
            except DEATHS:
                pass  # The run has ended the same way; seen below.
            else:
                self._rows += self.report.rows
                self._pending = self._actor.report.remote()
        return _outcome(self._run) if _is_ready(self._run) else None

    def take_rows(self) -> list[dict[str, Any]]:
        """Rows of the reports that came since the last call."""
        rows, self._rows = self._rows, []
        return rows

    def wait_for_report(self, timeout_s: float) -> None:
        """Wait up to ``timeout_s`` for the report that was asked for last, and ask for another."""
        ray.wait([self._pending], timeout=timeout_s)
        self.poll()

    def call(self, method: str, timeout_s: float) -> Any:
        """What ``method`` of the host returns, or None when it does not answer in time."""
        try:
            return ray.get(getattr(self._actor, method).remote(), timeout=timeout_s)
        except RayError:
            return None

    def tell(self, method: str, *arguments: Any) -> None:
        """Call ``method`` of the host. Returns at once, and nobody hears what it returns."""
        getattr(self._actor, method).remote(*arguments)

    def request_stop(self) -> None:
        """Ask ``run`` to end. Returns at once."""
        self._actor.stop.remote()

    def kill(self) -> None:
        """End the process without saving. Returns at once."""
        ray.kill(self._actor, no_restart=True)


class RewardHandle(Handle):
    """One placed process of a reward model, whose ``run`` loads it. Ray starts it again where it dies."""

    def __init__(self, name: str, actor: Any) -> None:
        super().__init__(name, actor)
        self.num_restarts = 0
        """Processes that took the place of a dead one."""
        self._has_loaded = False

    @property
    def actor(self) -> Any:
        """What rollout actors call."""
        return self._actor

    def poll(self) -> Ended | None:
        """Take over a report that has come and ask for the next one; say why it could not be loaded.

        None while it loads or works, and while Ray starts it again. Returns at once.
        """
        self.heard = False
        if _is_ready(self._pending):
            self._hear()
            self._pending = self._actor.report.remote()
        if self._run is None or not _is_ready(self._run):
            return None
        ended = _outcome(self._run)
        if ended.error is not None or (ended.died and not self._has_loaded):
            return ended
        self._has_loaded = True
        self._run = self._actor.run.remote() if ended.died else None
        return None

    def _hear(self) -> None:
        try:
            report = ray.get(self._pending)
        except DEATHS:
            if self._run is None:  # The next process has to load it again.
                self._run = self._actor.run.remote()
            return
        self.heard = True
        if self.report is not None and report.pid != self.report.pid:
            self.num_restarts += 1
            if self._run is None:
                self._run = self._actor.run.remote()
        self.report = report


class RemoteRewardModel:
    """A reward model in processes of its own, as a :class:`~mara.common.contracts.RewardModel`.

    Lives in a rollout actor. Conversations are spread over the processes. One that failed gets none until it
    says that it works again: what it is asked while it loads its model would wait for that.
    """

    def __init__(self, name: str, actors: Sequence[Any], timeout_s: float) -> None:
        self._name, self._actors, self._timeout_s = name, list(actors), timeout_s
        self._first = 0
        self._away: dict[int, Any] = {}
        """Process that failed → the report it was asked for since."""
        self._has_told = False

    def wait_until_loaded(self, should_stop: threading.Event) -> None:
        """Wait until each process has loaded its model, or ``should_stop`` is set."""
        for actor in self._actors:
            while not should_stop.is_set():
                try:
                    if ray.get(actor.report.remote(), timeout=self._timeout_s).phase == RUNNING:
                        break
                except RayError:  # It is being started again, or its machine is slow.
                    pass
                should_stop.wait(ASK_S)

    def score(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """Return float32 [B], NaN for those whose process failed. Blocks for ``timeout_s`` at most.

        Raises:
            RayError: none of the processes gave scores; what the last one met.
        """
        scores_B = torch.full((len(conversations),), torch.nan)
        usable = self._usable()
        count = min(len(usable), len(conversations))
        asked = []
        for part in range(count):
            number = usable[(self._first + part) % len(usable)]
            ref = self._actors[number].score.remote(list(conversations[part::count]))
            asked.append((part, number, ref))
        self._first += 1
        deadline = time.monotonic() + self._timeout_s
        errors: list[RayError] = []
        for part, number, ref in asked:
            try:
                scores = ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
            except RayError as error:
                errors.append(error)
                self._away[number] = self._actors[number].report.remote()
            else:
                scores_B[part::count] = torch.tensor(scores, dtype=torch.float32)
        if errors and len(errors) == count:
            cause = getattr(errors[-1], "cause", None)
            raise cause if isinstance(cause, Exception) else errors[-1]
        if errors and not self._has_told:
            self._has_told = True
            logger.warning("rewards.%s: a process of it failed (%s)", self._name, _first_line(errors[0]))
        return scores_B

    def _usable(self) -> list[int]:
        """Processes that work, as far as is known; all of them where none does."""
        for number, report in list(self._away.items()):
            if not _is_ready(report):
                continue
            del self._away[number]
            try:
                works = ray.get(report).phase == RUNNING
            except RayError:
                works = False
            if not works:
                self._away[number] = self._actors[number].report.remote()
        every = range(len(self._actors))
        return [number for number in every if number not in self._away] or list(every)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_ready(ref: Any) -> bool:
    ready, _ = ray.wait([ref], timeout=0)
    return bool(ready)


def _outcome(run: Any) -> Ended:
    try:
        return Ended(result=ray.get(run))
    except DEATHS:
        return Ended(died=True)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else error
        # Its text is the remote traceback; its other attributes are those of the cause.
        return Ended(error=cause, trace=str(error))
    except RayError as error:
        return Ended(error=error, trace=traceback.format_exc())


class Cluster:
    """The Ray cluster at an address, joined for a run."""

    def __init__(self, address: str, *, is_own: bool = False) -> None:
        """``is_own``: the run has started it, so it is known to be there."""
        self._address = address
        self._is_own = is_own

    def open(self) -> None:
        """Join the cluster. Takes seconds and blocks; does not have to happen in the main thread.

        Raises:
            UserError: there is no cluster at the address, or it has a token that is not known here.
        """
        if not self._is_own:
            check_address(self._address)
        try:
            ray.init(
                address=self._address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
            )
        except (AuthenticationError, ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0].partition(". ")[0]
            raise UserError(
                f"ray.address: the cluster at {self._address!r} cannot be joined ({reason}); start one with "
                "`ray start --head`, or, if it has a token, set RAY_AUTH_MODE=token and have the token in "
                "RAY_AUTH_TOKEN or ~/.ray/auth_token"
            ) from error

    def close(self) -> None:
        """Leave the cluster. Does nothing twice."""
        ray.shutdown()

    def resources(self) -> dict[str, float]:
        """What the cluster has in all, by Ray's names."""
        return dict(ray.cluster_resources())

    def place_learner(self, spec: LearnerSpec) -> Handle:
        """Start the learner, on a GPU if it wants one and the cluster has one to spare."""
        config = spec.config
        num_gpus = learner_gpus(config, self.resources().get("GPU", 0))
        options = {
            "num_cpus": 1,
            "num_gpus": num_gpus,
            "runtime_env": _environment(config.learner.num_threads, num_gpus),
        }
        return self._place(LearnerHost, spec, options)

    def place_rollout(self, spec: RolloutSpec) -> Handle:
        """Start a rollout actor with the resources of ``rollout``."""
        rollout = spec.config.rollout
        options = {
            "num_cpus": rollout.num_cpus,
            "num_gpus": rollout.num_gpus,
            "runtime_env": _environment(rollout.num_threads, rollout.num_gpus),
        }
        return self._place(RolloutHost, spec, options)

    def place_reward(self, spec: RewardSpec) -> RewardHandle:
        """Start a process of a reward model with the resources it asks for.

        Ray starts it again where it dies, under the same handle, which the rollout actors have: the
        supervisor counts that and says when it is too often.
        """
        reward = spec.config.reward_models[spec.reward]
        remote = ray.remote(RewardHost).options(
            num_cpus=reward.num_cpus,
            num_gpus=reward.num_gpus,
            runtime_env=_environment(reward.num_threads, reward.num_gpus),
            # Each rollout actor has one call under way, and one that it gave up may be another.
            max_concurrency=THREADS_PER_HOST + 2 * spec.config.rollout.num_actors,
            max_restarts=-1,
        )
        return RewardHandle(spec.name, remote.remote(spec))

    def remote_models(
        self, config: RunConfig, handles: Mapping[str, Sequence[RewardHandle]]
    ) -> dict[str, RemoteRewardModel]:
        """What rollout actors ask for scores, by the name of the reward model."""
        return {
            name: RemoteRewardModel(name, [one.actor for one in its], config.reward_models[name].timeout_s)
            for name, its in handles.items()
        }

    def place_comparison(self, spec: ComparisonSpec) -> Handle:
        """Start a process that answers and scores for a comparison."""
        config = spec.config
        options = {
            "num_cpus": config.num_cpus,
            "num_gpus": config.num_gpus,
            "runtime_env": _environment(config.num_threads, config.num_gpus),
        }
        return self._place(ComparisonHost, spec, options)

    def _place(
        self,
        host: Callable[..., Any],
        spec: LearnerSpec | RolloutSpec | ComparisonSpec,
        options: dict[str, Any],
    ) -> Handle:
        # Restarts are decided by the supervisor, which counts them and gives each a name and a log.
        remote = ray.remote(host).options(max_concurrency=THREADS_PER_HOST, max_restarts=0, **options)
        return Handle(spec.name, remote.remote(spec))


def check_address(address: str) -> None:
    """A cluster may be at ``address``, ``auto`` or ``HOST:PORT``: Ray would wait for minutes where none is.

    Raises:
        UserError: nothing listens there, or what does is no Ray, or it is no such address.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UserError(f"ray.address={address} is not an address; give auto or HOST:PORT")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"ray.address: nothing answers at {address!r} ({error}); start a cluster with `ray start --head` "
            "or leave ray.address out"
        ) from error
    with connection:
        # Of a cluster with TLS nothing can be read without its certificates.
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        try:
            is_ray = _speaks_http2(connection)
        except TimeoutError as error:
            raise UserError(
                f"ray.address: {address!r} took the connection and said nothing within {CONNECT_S:g} s; look "
                "whether that is the address that `ray start --head` printed, and at that machine"
            ) from error
        if not is_ray:
            raise UserError(
                f"ray.address: what listens at {address!r} is no Ray cluster; give the address that "
                "`ray start --head` printed or leave ray.address out"
            )


def _speaks_http2(connection: socket.socket) -> bool:
    """Whether the other side begins as HTTP/2 does (RFC 9113, section 3.4), on which Ray's gRPC goes.

    Raises:
        TimeoutError: it has not said enough within ``CONNECT_S``.
    """
    deadline = time.monotonic() + CONNECT_S
    frame = bytes([0, 0, 0, HTTP2_SETTINGS, 0, 0, 0, 0, 0])
    answer = b""
    try:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame)
        while len(answer) < len(frame):
            connection.settimeout(max(1e-3, deadline - time.monotonic()))
            if not (part := connection.recv(len(frame) - len(answer))):
                return False
            answer += part
    except TimeoutError:
        raise
    except OSError:  # It hangs up.
        return False
    return answer[3] == HTTP2_SETTINGS


def learner_gpus(config: RunConfig, in_cluster: float) -> float:
    """GPUs, or a fraction of one, for the learner: what rollout actors and reward models leave, at most one.

    Raises:
        UserError: the learner must have a GPU and none is left.
    """
    if config.learner.device == "cpu":
        return 0.0
    left = in_cluster - config.rollout.num_actors * config.rollout.num_gpus - config.reward_gpus
    if left <= 0 and config.learner.device.startswith("cuda"):
        raise UserError(
            f"learner.device={config.learner.device}: the cluster has {in_cluster:g} GPUs, rollout actors "
            f"and reward models take {in_cluster - left:g}; lower rollout.num_gpus or rewards.NAME.num_gpus, "
            "or use learner.device=cpu"
        )
    return min(1.0, max(0.0, round(left, 4)))


def _environment(num_threads: int, num_gpus: float) -> dict[str, Any]:
    """Numeric libraries read these when they are loaded: too late to set them inside the process."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    variables = {**dict.fromkeys(names, str(num_threads)), "TOKENIZERS_PARALLELISM": "false"}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        if name in os.environ:  # A worker on another machine would not know it.
            variables[name] = os.environ[name]
    if num_gpus == 0:  # Ray leaves all GPUs visible then, and one that is taken is missing in its accounts.
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return {"env_vars": variables}
