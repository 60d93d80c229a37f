"""The card of a reward head: what it was fitted to and how far it can be trusted. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mara.actors.config import LLMConfig
from mara.actors.head_config import FitConfig, FitReport

MARKDOWN_FILE = "README.md"

MEANING = {
    "last of 5": "the LLM, always taking the last of 5 candidates",
    "last of 40": "the LLM, always taking the last of up to 40 candidates",
    "hot": "the LLM at temperature 1.6 among 200 candidates",
    "half slips of 5": "the LLM, every second token another one of 5 than the first",
    "third slips of 40": "the LLM, every third token another one of up to 40 than the first",
    "shuffled": "words in a random order",
    "repeated": "a phrase or sentence repeated to the same length",
    "garbled": "15–60 % of the words replaced by words of other texts",
    "stock loop": "a common word or two repeated",
    "cut to a half": "the first half of the same text",
    "cut to a quarter": "the first quarter of the same text",
    "two tokens": "the first two tokens of the same text",
    "off topic": "an answer to another question (not fitted to)",
}


def card_of(config: FitConfig, report: FitReport) -> dict[str, Any]:
    """What ``head.json`` keeps beside the head's shape."""
    return {
        "name": report.name,
        "llm": report.llm,
        "fit": config.model_dump(mode="json", exclude={"pairs", "prompts"})
        | {"ridge": config.ridge_used}
        | {"pairs": Path(config.pairs).name, "prompts": config.prompts.name if config.prompts else None},
        "report": report.model_dump(mode="json", exclude={"pairs"}),
    }


def command_of(llm: LLMConfig, config: FitConfig) -> str:
    """The command that fits this head; files by their name alone."""
    words = [
        "mara reward fit",
        f"--llm {llm.model}",
        f"--pairs {Path(config.pairs).name}",
        f"--name {config.name}",
    ]
    if config.prompts is not None:
        words.append(f"--prompts {config.prompts.name}")
    defaults = FitConfig(pairs=config.pairs)
    skipped = {"pairs", "prompts", "name", "data_licence"}
    for field in FitConfig.model_fields:
        value = getattr(config, field)
        if field not in skipped and value != getattr(defaults, field):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"{field}={text}")
    return " ".join([*words, "--out FOLDER"])


def write_card(folder: Path, llm: LLMConfig, config: FitConfig, report: FitReport) -> None:
    """Write ``README.md`` into ``folder``."""
    rows = "\n".join(
        f"| {MEANING.get(kind, kind)} | {100 * share.share:.1f} % | {share.num} |"
        for kind, share in report.robustness.items()
    )
    prefixes = ", ".join(f"{100 * share:.1f} % at {n} tokens" for n, share in report.prefix_accuracy.items())
    left_out = (
        f"{report.num_shared_answers} with an answer given to more than two different prompts, "
        f"{report.num_too_long} too long"
    )
    cut = f"answers cut to {config.max_answer_tokens} tokens, prompts to {config.max_prompt_tokens}"
    interval = f"95 % interval {100 * report.accuracy_low:.1f}–{100 * report.accuracy_high:.1f} %"
    own = ", ".join(f"{kind} {score:+.2f}" for kind, score in report.base_scores.items())
    text = f"""# Reward head: {report.name}, for {report.llm}

Scores an answer from the hidden states that the frozen LLM has at its tokens. Higher is better; 0 is the
LLM's average sampled answer, 1 is one standard deviation better. It works with this LLM alone.

| | |
|---|---|
| Pairs | `{Path(config.pairs).name}`, {report.num_pairs} read |
| Licence of the pairs | {config.data_licence} |
| Left out | {left_out} |
| Fitted to | {report.num_fit} pairs, {cut} |
| Held out | {report.num_held_out} pairs; no prompt of theirs was fitted to |
| Held-out pairwise accuracy | **{100 * report.accuracy:.1f} %** ({interval}, Wilson's over prompts) |
| With both answers cut | {prefixes} |

## Does it prefer real text to broken text?

Share of held-out comparisons in which the real text scores higher.

| broken text | share | comparisons |
|---|---|---|
{rows}

Mean score of the LLM's own answers by how they were drawn: {own}.
Cutting a sampled answer to half changes its score by {report.length_slope:+.2f} on average.

## Again

```
{command_of(llm, config)}
```
"""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKDOWN_FILE).write_text(text, encoding="utf-8")
