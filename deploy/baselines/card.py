"""The folder of a baseline: its adapter, ``baseline.json`` and ``README.md``. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from mara.common.errors import UserError
from mara.common.files import write_whole
from mara.deploy.baselines.config import (
    AlignerSettings,
    BaselineConfig,
    BaselineReport,
    Compute,
    PairsConfig,
    RLHFSettings,
)
from mara.deploy.config import portable_name

RECORD = "baseline.json"
MARKDOWN_FILE = "README.md"
TITLES = {
    "dpo": "DPO with LoRA",
    "rlhf": "RLHF (RLOO) with LoRA",
    "aligner": "A corrector as Aligner, with LoRA",
}
SKIPPED = {"llm", "pairs", "prompts", "rewards"}
"""Settings that stand elsewhere in the card, with files by their name alone."""


def write_cards(folder: Path, config: BaselineConfig, report: BaselineReport) -> None:
    """Write ``baseline.json`` and ``README.md`` into ``folder``."""
    content = {"llm": config.llm.model, "settings": settings_of(config), **report.model_dump(mode="json")}
    write_whole(folder / RECORD, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / MARKDOWN_FILE, markdown(config, report))


def read_report(folder: Path) -> BaselineReport:
    """What ``baseline.json`` in ``folder`` says of the training.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return BaselineReport.model_validate({name: content[name] for name in BaselineReport.model_fields})
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"baseline: {folder / RECORD} cannot be read ({reason}); give a folder that `mara baseline` wrote"
        ) from error


def settings_of(config: BaselineConfig) -> dict[str, object]:
    """The settings by name; data and reward heads without the paths of this machine."""
    settings: dict[str, object] = config.model_dump(mode="json", exclude=SKIPPED)
    if isinstance(config, PairsConfig):
        settings["pairs"] = [Path(source).name for source in config.pairs]
    if isinstance(config, RLHFSettings):
        settings["prompts"] = portable_name(config.prompts)
        settings["rewards"] = {
            name: {"path": portable_name(head.path), "weight": head.weight}
            for name, head in config.rewards.items()
        }
    return settings


def system_of(config: BaselineConfig, folder: str) -> str:
    """The lines that name the baseline in a configuration of `mara eval`."""
    if isinstance(config, AlignerSettings):
        template = json.dumps(config.template, ensure_ascii=False)
        return f"aligner:\n  kind: corrector\n  of: base\n  adapter: {folder}\n  template: {template}"
    return f"{config.method}: {{kind: llm, adapter: {folder}}}"


def markdown(config: BaselineConfig, report: BaselineReport) -> str:
    """The card for people."""
    rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in settings_of(config).items())
    sources = "; ".join(f"`{name}` (SHA-256 {digest[:16]}…)" for name, digest in report.data.sources.items())
    left_out = ", ".join(f"{count} {why}" for why, count in report.data.left_out.items()) or "none"
    last = ", ".join(f"{name} {value:.4g}" for name, value in report.last.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    at = "" if report.revision is None else f" at {report.revision}"
    llm = f"{config.llm.model}{at}, in {report.dtype}"
    unit = "answers" if isinstance(config, RLHFSettings) else "pairs"
    return f"""# {TITLES[report.method]}, for {config.llm.model}

A PEFT adapter of {report.num_trained:,} parameters, trained by TRL to be compared with an agent.

| | |
|---|---|
| LLM | {llm} |
| Data | {sources} |
| Read | {report.data.num_read} |
| Left out | {left_out} |
| Trained on | {report.data.num_used} {unit}, {report.num_steps} steps |
| Wall time | {report.seconds:.0f} s |
| Compute | {flops_text(report.compute.total)} |
| At the end | {last} |
| Versions | {versions} |

## Settings

| | |
|---|---|
{rows}

## Compute

{compute_lines(report.compute)}

## In a comparison

```yaml
{system_of(config, "FOLDER")}
```
"""


def compute_lines(compute: Compute) -> str:
    """Parts, counts and formula, a line each."""
    parts = [f"- {name}: {flops_text(flops)}" for name, flops in compute.flops.items()]
    tokens = ", ".join(f"{count:,} {name}" for name, count in compute.tokens.items())
    return "\n".join([*parts, f"- tokens counted: {tokens}", f"- {compute.formula}"])


def flops_text(flops: float) -> str:
    """``123.4 TFLOP``: 10¹² operations."""
    return f"{flops / 1e12:.1f} TFLOP"


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("\n", "⏎")
