"""What a comparison found, computed from its files alone. Legend: N prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mara.actors.evaluation import distinct, preference_rate
from mara.actors.prompts import Prompt
from mara.deploy.comparison.config import LIKELIHOOD, AgentSystem, ComparisonConfig
from mara.deploy.comparison.results import Results, Row

REPEATED = 4
"""Words in a row that count as a repetition."""

Report = dict[str, Any]
"""As ``report.json`` has it:

``pairs``: ``a``, ``b``, ``dataset``, ``num_prompts``, and by judge, ``joint`` and other juries the preference
rate of a against b (a fraction) with its 95 % interval, wins, ties and losses, as ``mara eval RUN`` has them.
``juries``: the judges of ``joint`` and of the other rates that several give together.
``categories``: the same with ``category``, for its prompts alone.
``verdicts``: of each LLM judge, pair and data set how many verdicts changed with the order or were unclear.
``refused``: of each judge, data set and what it was to judge how often its server refused, and what it said
the first time. These prompts are left out of its rates and means.
``agents``: how each agent was used, in a few words.
``systems``: data set → system → mean scores, fluency, speed.
``samples``: data set → prompts with every system's answer and scores.
"""


def make_report(config: ComparisonConfig, results: Results) -> Report:
    """The report of a comparison whose files are complete."""
    report: Report = {
        "name": config.name,
        "baseline": config.baseline,
        "juries": {name: list(judges) for name, judges in config.joint_rates.items()},
        "pairs": [],
        "categories": [],
        "verdicts": [],
        "refused": [],
        "agents": {
            name: system.used_in(config.decoding).how
            for name, system in config.systems.items()
            if isinstance(system, AgentSystem)
        },
        "systems": {},
        "samples": {},
    }
    for dataset in config.datasets:
        found = _Found(config, results, dataset)
        for a, b in config.compared:
            where = {"a": a, "b": b, "dataset": dataset}
            everything = range(len(found.prompts))
            report["pairs"].append({**where, **found.rates(a, b, everything)})
            for category, places in found.categories().items():
                report["categories"].append({**where, "category": category, **found.rates(a, b, places)})
            report["verdicts"] += [{**where, **counts} for counts in found.order_effects(a, b)]
        report["refused"] += [{"dataset": dataset, **counts} for counts in found.refusals()]
        report["systems"][dataset] = {name: found.system(name) for name in config.systems}
        report["samples"][dataset] = found.samples(config.num_samples)
    report["settings"] = config.model_dump(mode="json")
    return report


class _Found:
    """Everything about one data set, in its order."""

    def __init__(self, config: ComparisonConfig, results: Results, dataset: str) -> None:
        self._config = config
        self.prompts = results.prompts(dataset)

        def in_order(rows: Mapping[str, Row]) -> list[Row]:
            return [rows[prompt.id] for prompt in self.prompts]

        self._answers = {name: in_order(results.answers(dataset, name)) for name in config.systems}
        self._scores = {
            (name, judge): in_order(results.scores(dataset, name, judge))
            for name in config.systems
            for judge in (LIKELIHOOD, *config.scoring_judges)
        }
        self._verdicts = {
            (a, b, judge): in_order(results.verdicts(dataset, a, b, judge))
            for a, b in config.compared
            for judge in config.llm_judges
        }

    def rates(self, a: str, b: str, places: Sequence[int]) -> dict[str, Any]:
        """Preference rates of ``a`` against ``b`` on the prompts at ``places``, by judge and by jury.

        A jury's win is better by each of its judges. Equal texts are ties, unless they were refused. A judge
        has no rate where it has refused all.
        """
        chosen = np.array(list(places), int)
        differs_N = np.array([one != other for one, other in zip(*self._texts(a, b), strict=True)])
        scored = {
            judge: np.sign(config.weight)
            * (self._score(a, judge) - self._score(b, judge))
            * differs_N  # nan, where one was refused, stays
            for judge, config in self._config.scoring_judges.items()
            if config.weight != 0
        }
        compared = {
            judge: np.array([row.get("difference") for row in self._verdicts[a, b, judge]], float)
            for judge in self._config.llm_judges
        }
        rates: dict[str, Any] = {"num_prompts": len(chosen)}
        judged = {judge: [values_N] for judge, values_N in (scored | compared).items()}
        for name, judges in self._config.joint_rates.items():
            judged[name] = [scored[judge] for judge in judges]
        for judge, values in judged.items():
            is_known_N = np.isfinite(np.stack(values)).all(axis=0)
            if len(known := chosen[is_known_N[chosen]]):
                rate = preference_rate([values_N[known] for values_N in values], self._config.seed)
                rates[judge] = asdict(rate)
        return rates

    def categories(self) -> dict[str, list[int]]:
        """Places of the prompts of each category. Prompts without a category are in none."""
        places: dict[str, list[int]] = {}
        for place, prompt in enumerate(self.prompts):
            if prompt.category:
                places.setdefault(prompt.category, []).append(place)
        return dict(sorted(places.items()))

    def order_effects(self, a: str, b: str) -> list[dict[str, Any]]:
        """How often each LLM judge said something else in the other order, or nothing clear."""
        found = []
        for judge in self._config.llm_judges:
            verdicts = [tuple(row["verdicts"]) for row in self._verdicts[a, b, judge] if "refused" not in row]
            agreeing = {("A", "B"), ("B", "A"), ("tie", "tie")}
            unclear = sum("unclear" in both for both in verdicts)
            disagreeing = sum(both not in agreeing for both in verdicts) - unclear
            found.append({"judge": judge, "num_disagreeing": disagreeing, "num_unclear": unclear})
        return found

    def refusals(self) -> Iterator[dict[str, Any]]:
        """What each judge's server refused to judge, how often, and what it said the first time."""
        asked = {(name, judge): rows for (name, judge), rows in self._scores.items()}
        asked |= {(f"{a} against {b}", judge): rows for (a, b, judge), rows in self._verdicts.items()}
        for (what, judge), rows in asked.items():
            if said := [row["refused"] for row in rows if "refused" in row]:
                yield {"judge": judge, "of": what, "num": len(said), "said": said[0]}

    def system(self, name: str) -> dict[str, Any]:
        """Mean scores, fluency and speed of one system. None where that is not known."""
        answers, likelihoods = self._answers[name], self._scores[name, LIKELIHOOD]
        texts = [answer["response"] for answer in answers]
        words = [text.lower().split() for text in texts]
        num_tokens = sum(row["num_tokens"] for row in likelihoods)
        logprob = sum(row["logprob"] for row in likelihoods)
        timed = [answer for answer in answers if answer["seconds"]]
        ends = [answer["finish_reason"] for answer in answers if answer["finish_reason"] is not None]
        return {
            "mean_scores": {judge: _mean(self._score(name, judge)) for judge in self._config.scoring_judges},
            "perplexity": float(np.exp(-logprob / num_tokens)) if num_tokens else None,
            "relevance": _relevance(likelihoods),
            "distinct_1": distinct(words, 1),
            "distinct_2": distinct(words, 2),
            "distinct_3": distinct(words, 3),
            "repetition": repetition(words),
            "interventions": _interventions(answers)
            if isinstance(self._config.systems[name], AgentSystem)
            else None,
            "mean_tokens": num_tokens / len(answers),
            "mean_words": float(np.mean([len(of_one) for of_one in words])),
            "num_empty": sum(not text.strip() for text in texts),
            "eos_share": sum(end == "eos" for end in ends) / len(ends) if ends else None,
            "tokens_per_s": (
                sum(answer["tokens"] for answer in timed) / sum(answer["seconds"] for answer in timed)
                if timed
                else None
            ),
        }

    def samples(self, num: int) -> list[dict[str, Any]]:
        """``num`` prompts, evenly spread, with every system's answer."""
        places = np.linspace(0, len(self.prompts) - 1, min(num, len(self.prompts))).astype(int).tolist()
        return [self._sample(self.prompts[place], place) for place in places]

    def _sample(self, prompt: Prompt, place: int) -> dict[str, Any]:
        return {
            "id": prompt.id,
            "prompt": prompt.prompt,
            "category": prompt.category,
            "answers": {name: answers[place]["response"] for name, answers in self._answers.items()},
            "scores": {
                name: {
                    judge: self._scores[name, judge][place]["score"] for judge in self._config.scoring_judges
                }
                for name in self._config.systems
            },
        }

    def _texts(self, *names: str) -> list[list[str]]:
        return [[answer["response"].strip() for answer in self._answers[name]] for name in names]

    def _score(self, name: str, judge: str) -> np.ndarray:
        return np.array([row["score"] for row in self._scores[name, judge]], float)


def _relevance(likelihoods: Sequence[Row]) -> float | None:
    """What a token owes to its prompt, in nats: log p(response | its prompt) - log p(response | another one),
    over the tokens. 0: it could as well be an answer to something else. None if there is but one prompt."""
    compared = [row for row in likelihoods if row["logprob_elsewhere"] is not None]
    num_tokens = sum(row["num_tokens"] for row in compared)
    gained = sum(row["logprob"] - row["logprob_elsewhere"] for row in compared)
    return gained / num_tokens if num_tokens else None


def _interventions(answers: Sequence[Row]) -> float | None:
    """Share of the tokens that are not the LLM's first candidate; None if there is no token, or where an
    earlier version, which did not count them, made answers."""
    num_tokens = sum(answer["tokens"] for answer in answers)
    if not num_tokens or any("changed" not in answer for answer in answers):
        return None
    return float(sum(answer["changed"] for answer in answers) / num_tokens)


def _mean(scores_N: np.ndarray) -> float | None:
    """Of those that there are; None if there are none."""
    known_N = scores_N[np.isfinite(scores_N)]
    return float(known_N.mean()) if len(known_N) else None


def repetition(texts: Sequence[Sequence[str]]) -> float:
    """Share of an answer's runs of four words that it had before; mean over the answers with such runs.

    Example: "a b c d a b c d" has the runs abcd, bcda, cdab, dabc, abcd, of which one of five is repeated.
    """
    shares = []
    for words in texts:
        runs = [tuple(words[start : start + REPEATED]) for start in range(len(words) - REPEATED + 1)]
        if runs:
            shares.append(1 - len(set(runs)) / len(runs))
    return float(np.mean(shares)) if shares else 0.0
