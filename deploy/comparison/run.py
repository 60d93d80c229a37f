"""``mara eval CONFIG``: from a configuration to a report, with nothing left running.

::

    checks ─► folder ─► Ray ─► answers ─► scores ─► Ray ends ─► verdicts of LLM judges ─► report
                                  │          │                        │
                                  └──────────┴── a line in a file ────┘   what is there is not made again
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mara.actors.llm import cache_folder
from mara.actors.llm_judge import Comparison, EndpointUnavailable
from mara.common.errors import UserError
from mara.common.files import write_whole
from mara.deploy.comparison.checks import Checked, changes, check
from mara.deploy.comparison.config import RECORD, BestOfNSystem, ComparisonConfig
from mara.deploy.comparison.crew import Crew
from mara.deploy.comparison.host import HostSpec, Work
from mara.deploy.comparison.judges import make_llm_judge
from mara.deploy.comparison.page import print_summary, write_report
from mara.deploy.comparison.plan import Planner
from mara.deploy.comparison.report import make_report
from mara.deploy.comparison.results import Results
from mara.deploy.comparison.verdicts import Pair, Refusals, Refused, Verdicts
from mara.deploy.config_file import dump_comparison, load_comparison, read_content
from mara.deploy.console import View, open_display, say
from mara.deploy.exit import RunFailed
from mara.deploy.fleet import Rates
from mara.deploy.preflight import check_out
from mara.deploy.process import LOADING
from mara.deploy.progress import Progress, StoppedEarly
from mara.deploy.ray_head import open_cluster
from mara.deploy.run_folder import CONFIG_FILE, LOGS, check_resolved, fill_folder, make_folder
from mara.deploy.run_lock import PREDECESSOR_S, hold_run
from mara.deploy.signals import StopSignal
from mara.deploy.trust import called_by_comparison, check_trusted

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a comparison is kept."""

    out: Path | None = None
    """A new folder. None: one in the configuration's ``dir``, named by the time."""
    resumed: Path | None = None
    """The folder of a comparison that goes on."""


def resumed_settings(folder: Path, overrides: Sequence[str], *, is_trusted: bool = False) -> ComparisonConfig:
    """The settings of the comparison in ``folder``.

    ``is_trusted``: what they name may be called, whoever began it.

    Raises:
        UserError: it is no such folder, a setting is wrong, or it is somebody else's who is not trusted.
    """
    check_resumed(folder)
    path = folder / CONFIG_FILE
    check_resolved(path, read_content(path))
    config = load_comparison(path, overrides)
    named = called_by_comparison(load_comparison(path, ()))
    check_trusted(path, named, called_by_comparison(config), is_trusted=is_trusted)
    return config


def check_resumed(folder: Path) -> None:
    """A comparison was begun in ``folder``.

    Raises:
        UserError: none was.
    """
    if not folder.exists():
        raise UserError(f"--resume={folder} does not exist; give the folder of a comparison that ended early")
    for name in (CONFIG_FILE, RECORD):
        if not (folder / name).is_file():
            raise UserError(
                f"--resume={folder} has no {name}; give the folder of a comparison that "
                "`mara eval CONFIG` began"
            )


def check_same(folder: Path, checked: Checked) -> None:
    """What is compared is what the comparison in ``folder`` began with.

    Raises:
        UserError: it is not.
    """
    before = json.loads((folder / RECORD).read_text())
    if changed := changes(before, checked.identity):
        raise UserError(
            f"--resume={folder}: what was found there belongs to another comparison "
            f"({'; '.join(changed)}); start a new one, or undo that"
        )


def compare(config: ComparisonConfig, place: Place) -> int:
    """Make the comparison, or what is left of it, and its report. Returns when every process is gone.

    Ctrl-C, SIGTERM or SIGHUP ends it early, which the exit status that is returned tells; everything that was
    found is kept. Else it is 0.

    Raises:
        UserError: the settings are wrong.
        RunFailed: it could not go on; what was found is kept.
        KeyboardInterrupt: a second signal came.
    """
    view = View(title=f"mara · {config.name}", num_episodes=0, unit="answers")
    folder = place.resumed
    with StopSignal() as stop, ExitStack() as exits:
        try:
            with open_display(view) as display:
                progress = Progress(view, display, stop)
                kept = None if place.resumed is None else Results(place.resumed)
                checked = check(config, progress.state, kept)
                folder = exits.enter_context(_take_folder(config, checked, place))
                results = exits.enter_context(Results(folder))
                display.say(f"folder of the comparison: {folder}")
                if checked.unpacks_llm:
                    display.say(f"the LLM is unpacked into {cache_folder()} first, once for this machine")
                _Comparison(config, checked, results, progress).run()
                progress.state("making the report")
        except StoppedEarly:
            say("stopped; nothing had been made" if folder is None else f"stopped; {_how_to_resume(folder)}")
            return stop.exit_status
        except RunFailed as error:
            raise error if folder is None else RunFailed(f"{error}; {_how_to_resume(folder)}") from error
        except OSError as error:  # The disk is full, most likely.
            if folder is None:
                raise
            reason = f"{error.filename or 'output'}: {error.strerror or error}"
            raise RunFailed(f"{reason}; {_how_to_resume(folder)}") from error
        report = make_report(config, results)
        files = write_report(report, folder)
    print_summary(report)
    say("report:")
    for path in files:
        say(f"  {path}")
    return stop.exit_status


def _how_to_resume(folder: Path) -> str:
    return f"all that was found is kept, `mara eval --resume {folder}` goes on"


@contextmanager
def _take_folder(config: ComparisonConfig, checked: Checked, place: Place) -> Iterator[Path]:
    """The folder of the comparison, new or resumed, which nobody else uses meanwhile.

    Raises:
        UserError: somebody does, it cannot be written, or what is compared has changed since it was begun.
    """
    if place.resumed is None:
        folder = _new_folder(config, checked, place.out)
    else:
        folder = place.resumed.resolve()
        check_same(folder, checked)
    with hold_run(folder, 0.0 if place.resumed is None else PREDECESSOR_S):
        yield folder


def _new_folder(config: ComparisonConfig, checked: Checked, out: Path | None) -> Path:
    assert config.name is not None, "load_comparison gives a name"
    if out is None:
        folder = make_folder(config.dir, config.name, dump_comparison(config), "dir")
    else:
        check_out(out)
        folder = out.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        fill_folder(folder, dump_comparison(config))
    results = Results(folder)
    for name, prompts in checked.prompts.items():
        results.keep_prompts(name, prompts)
    # Last: with it the folder is one that can be resumed.
    write_whole(folder / RECORD, json.dumps(checked.identity, indent=2) + "\n")
    return folder


class _Comparison:
    """One comparison, up to the last verdict."""

    def __init__(
        self, config: ComparisonConfig, checked: Checked, results: Results, progress: Progress
    ) -> None:
        self._config = config
        self._checked = checked
        self._results = results
        self._progress = progress
        self._planner = Planner(config, checked.prompts, results)
        self._rates = Rates()
        self._refusals: dict[str, Refusals] = {}
        """Of each judge that scores and each system that chooses by scores, by the field of its settings."""

    def run(self) -> None:
        """Make what is missing.

        Raises:
            StoppedEarly: a signal has come.
        """
        self._keep_given()
        # Where nothing is left to answer and score, Ray is not needed.
        if any(self._planner.answers(wave) for wave in self._config.waves) or self._planner.scores():
            with ExitStack() as exits:
                self._answer_and_score(self._crew(exits))
        for name in self._config.llm_judges:
            self._judge(name)

    def _keep_given(self) -> None:
        """Take over the answers that somebody else made."""
        for system, by_dataset in self._checked.given.items():
            for dataset, responses in by_dataset.items():
                known = self._results.answers(dataset, system)
                for prompt, response in zip(self._checked.prompts[dataset], responses, strict=True):
                    if prompt.id not in known:
                        row = {"id": prompt.id, "prompt": prompt.prompt, "response": response}
                        nothing = {"tokens": None, "seconds": None, "finish_reason": None}
                        self._results.add_answer(dataset, system, row | nothing)

    def _crew(self, exits: ExitStack) -> Crew:
        config, folder = self._config, self._results.folder
        num_cpus = max(1, math.ceil(config.num_actors * config.num_cpus))
        cluster = open_cluster(config.ray.address, num_cpus, folder / LOGS / "ray.log", self._progress, exits)
        specs = [
            HostSpec(f"actor-{number}", config, folder, Path.cwd()) for number in range(config.num_actors)
        ]
        crew = Crew(cluster, config, specs, self._take, self._progress.display.say)
        exits.callback(crew.kill)
        return crew

    def _answer_and_score(self, crew: Crew) -> None:
        self._begin("answers", self._planner.num_answers, self._planner.count_answers())
        for wave in self._config.waves:
            self._refusals = {
                f"systems.{name}": Refusals(self._planner.has_chosen(name))
                for name in wave
                if isinstance(self._config.systems[name], BestOfNSystem)
            }
            self._work(crew, self._planner.answers(wave), "answering")
        works = self._planner.scores()
        self._begin("scores", sum(len(work.questions) for work in works))
        self._refusals = {
            f"judges.{name}": Refusals(self._planner.has_scored(name)) for name in self._config.scoring_judges
        }
        self._work(crew, works, "scoring")

    def _begin(self, unit: str, total: int, num_done: int = 0) -> None:
        """Count something else from here on."""
        view = self._progress.view
        view.unit, view.num_episodes, view.num_before = unit, total, num_done
        view.first_seen = None
        view.metrics.pop("rollout/tokens_per_s", None)
        view.metrics["episodes/total"] = num_done

    def _work(self, crew: Crew, works: Iterable[Work], doing: str) -> None:
        crew.add(works)
        while not crew.is_idle:
            crew.poll()
            self._show(crew, doing)
            self._pause()
        for field, refusals in self._refusals.items():
            refusals.settle(f"{field}: no scores ({refusals.said}); look at that, then resume")

    def _take(self, work: Work, row: dict[str, Any]) -> None:
        """Keep what was found."""
        system, found = row["system"], row["row"]
        if not work.judges:
            keep = partial(self._results.add_answer, work.dataset, system, found)
            self._keep_unless_refused(f"systems.{system}", row.get("refused"), keep)
        for judge, score in found.get("scores", {}).items():
            scored = {"id": found["id"], **score}
            keep = partial(self._results.add_score, work.dataset, system, judge, scored)
            self._keep_unless_refused(f"judges.{judge}", score.get("refused"), keep)
        self._count()

    def _keep_unless_refused(self, field: str, said: str | None, keep: Callable[[], None]) -> None:
        """Keep now, or, where a server refused, once it is known to take anything."""
        if said is not None:
            self._refusals[field].add(said, keep)
            return
        keep()
        if field in self._refusals:
            self._refusals[field].take()

    def _count(self) -> None:
        view = self._progress.view
        view.update({"episodes/total": view.metrics["episodes/total"] + 1})

    def _show(self, crew: Crew, doing: str) -> None:
        view = self._progress.view
        num_waiting = self._config.num_actors - crew.num_started
        if crew.num_started == 0:
            view.state = f"waiting for Ray to start {num_waiting} actor{'s' if num_waiting > 1 else ''}"
        elif crew.num_loading:
            view.state = f"{doing}; {crew.num_loading} of {self._config.num_actors} actors {LOADING}"
        else:
            view.state = doing
        if doing == "answering":
            rates = self._rates.update({"rollout/tokens_total": crew.num_tokens}, ("rollout/tokens",))
            view.metrics |= {name: rate for name, rate in rates.items() if rate >= 0}
        self._progress.display.refresh()

    def _pause(self) -> None:
        """Wait a little.

        Raises:
            StoppedEarly: a signal has come.
        """
        self._progress.pause(POLL_S)
        if self._progress.stop.requested:
            raise StoppedEarly

    def _judge(self, name: str) -> None:
        """Ask a judge that compares about every pair of answers it has not seen."""
        config = self._config.llm_judges[name]
        differing, has_answered = [], False
        for pair, row in self._planner.pairs(name):
            if pair.first != pair.second:
                if row is None:
                    differing.append(pair)
                else:
                    has_answered |= "refused" not in row
            elif row is None:
                self._keep(name, pair, Comparison(0, ("tie", "tie"), ("", "")))
        self._begin("verdicts", len(differing))
        self._progress.state(f"asking {name}")
        verdicts = Verdicts(make_llm_judge(name, config), differing, config.concurrency)
        num_left, refusals = len(differing), Refusals(has_answered)
        try:
            while num_left:
                for pair, found in verdicts.take():
                    if isinstance(found, Refused):
                        row = {"id": pair.id, "against": pair.against, "refused": found.why}
                        keep = partial(self._results.add_score, pair.dataset, pair.system, name, row)
                        refusals.add(found.why, keep)
                    else:
                        self._keep(name, pair, found)
                        refusals.take()
                    self._count()
                    num_left -= 1
                self._progress.display.refresh()
                self._pause()
        except EndpointUnavailable as error:
            raise RunFailed(f"judges.{name}: {error}") from error
        finally:
            verdicts.stop()
        refusals.settle(
            f"judges.{name}: {config.url} refuses every question ({refusals.said}); check model and "
            "max_tokens"
        )
        if refusals.num:
            self._progress.display.say(
                f"warning: judges.{name} refused {refusals.num} of {len(differing)} questions, which count "
                f"for nothing ({refusals.said})"
            )

    def _keep(self, judge: str, pair: Pair, found: Comparison) -> None:
        row = {"id": pair.id, "against": pair.against, **found._asdict()}
        self._results.add_score(pair.dataset, pair.system, judge, row)
