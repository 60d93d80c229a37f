"""Everything that can be wrong with a comparison, found before a model is loaded or a process started."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from mara.actors.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter
from mara.actors.config import DecodingConfig, GateConfig, LLMConfig
from mara.actors.decoding.policies import critic_used_in
from mara.actors.llm import check_quantization, resolve_device
from mara.actors.prompts import Prompt
from mara.common.agent import CARD_FILE, CRITIC_FILE, WEIGHTS_FILE, load_agent
from mara.common.errors import UserError
from mara.deploy.agent_card import warn_of_other_use, warn_of_untrained
from mara.deploy.calibration import steering_settings
from mara.deploy.comparison.config import (
    AgentSystem,
    ComparisonConfig,
    CorrectorSystem,
    LLMSystem,
    ResponsesSystem,
)
from mara.deploy.comparison.judges import check_scoring_judge, make_llm_judge
from mara.deploy.comparison.results import Results
from mara.deploy.comparison.sources import GivenAnswers, load_dataset
from mara.deploy.config import AgentUse
from mara.deploy.console import warn
from mara.deploy.hub import digest_of_prompts
from mara.deploy.model_shape import check_llm_template, find_digest, find_hidden_size
from mara.deploy.preflight import check_cache, check_context, check_writable
from mara.deploy.reward_models import WITHOUT_MEANING
from mara.deploy.run_folder import agent_folder, check_agent

FREE_TO_CHANGE = {
    "juries",
    "num_samples",
    "num_actors",
    "rows",
    "prompts_per_chunk",
    "max_attempts",
    "num_cpus",
    "num_gpus",
    "num_threads",
    "ray",
    "dir",
    "name",
}
"""Settings that decide how a comparison is made and shown, not what it finds."""
FREE_OF_JUDGES = (WITHOUT_MEANING | {"concurrency"}) - {"weight"}
"""The same of each judge. A weight's sign says what is better, and best of n goes by its size."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What the checks found out on the way."""

    prompts: dict[str, list[Prompt]]
    """Data set → its prompts."""
    given: dict[str, dict[str, list[str]]]
    """System whose answers somebody else made → data set → the answers, in its order."""
    identity: dict[str, Any]
    """What must stay the same for a comparison to go on: settings by dotted name, and digests of files."""
    unpacks_llm: bool
    """Whether the LLM is going to be unpacked into this machine's cache first."""


def check(
    config: ComparisonConfig,
    say: Callable[[str], None] = lambda _what: None,
    kept: Results | None = None,
) -> Checked:
    """Check files, devices, endpoints and the models' sizes. Takes seconds; ``say`` is told what is next.

    Prompts of the Hub that a comparison has ``kept`` are not asked for again.

    Raises:
        UserError: the first thing that is wrong: field, value, remedy.
    """
    say("checking prompts and answers")
    check_writable("dir", config.dir)
    prompts = {name: _prompts(name, config, kept) for name in config.datasets}
    given = {
        name: _given(name, system, prompts)
        for name, system in config.systems.items()
        if isinstance(system, ResponsesSystem)
    }
    say("checking devices")
    _check_devices(config)
    unpacks_llm = check_cache(config.llm, is_here=config.ray.address is None)
    say("checking the LLMs, agents and judges")
    digests = _check_systems(config) | _check_judges(config)
    for name, of_dataset in prompts.items():
        digests[f"datasets.{name}"] = digest_of_prompts(of_dataset)
    if config.llm_judges:
        say("checking the judges' endpoints")
    for name, judge in config.llm_judges.items():
        make_llm_judge(name, judge).check()
    content = json.loads(config.model_dump_json(exclude=FREE_TO_CHANGE))
    for judge in content["judges"].values():
        for name in FREE_OF_JUDGES:
            judge.pop(name, None)
    settings = _flat(content)
    return Checked(prompts, given, {"settings": settings, "digests": digests}, unpacks_llm)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
    found = [f"{name} is another" for name in _unlike(before["settings"], now["settings"])]
    return found + [
        f"the content of {name} has changed" for name in _unlike(before["digests"], now["digests"])
    ]


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _prompts(name: str, config: ComparisonConfig, kept: Results | None) -> list[Prompt]:
    dataset = config.datasets[name]
    if kept is not None and dataset.hub is not None and (prompts := kept.prompts(name)):
        return prompts
    return load_dataset(name, dataset)


def _given(
    name: str, system: ResponsesSystem, prompts: Mapping[str, Sequence[Prompt]]
) -> dict[str, list[str]]:
    answers = GivenAnswers(system.path, f"systems.{name}.path")
    return {dataset: answers.to(dataset, asked) for dataset, asked in prompts.items()}


def _check_devices(config: ComparisonConfig) -> None:
    if config.llm.device != "auto":
        try:
            torch.device(config.llm.device)
        except RuntimeError as error:
            raise UserError(
                f"llm.device={config.llm.device} is not a device; use auto, cpu, cuda or cuda:N"
            ) from error
    if config.ray.address is not None:
        return
    check_quantization(config.llm)
    resolve_device(config.llm.device)
    num_gpus = torch.cuda.device_count()
    if config.llm.device == "auto" and num_gpus and not config.num_gpus:
        warn(
            f"num_gpus=0: the actors work on the CPU, though there are {num_gpus} GPUs here; give each a "
            "part of one, such as 0.5"
        )
    if config.num_actors * config.num_gpus > num_gpus:
        raise UserError(
            f"num_gpus={config.num_gpus:g} for {config.num_actors} actors is more than the {num_gpus} GPUs "
            "here; lower it or num_actors"
        )
    if config.llm.device.startswith("cuda") and config.num_gpus == 0:
        raise UserError(
            f"llm.device={config.llm.device} needs a GPU for each actor, num_gpus is 0; give each a part of "
            "one, such as 0.5"
        )


def _check_systems(config: ComparisonConfig) -> dict[str, str]:
    """Every system can be made; SHA-256 of what its answers depend on, by setting."""
    _check_llm(config.llm, config)
    digests = {"llm": find_digest(config.llm)}
    for name, system in config.systems.items():
        field = f"systems.{name}"
        if isinstance(system, LLMSystem | AgentSystem | CorrectorSystem):
            digests |= _check_model(name, config)
        if isinstance(system, AgentSystem):
            digests[f"{field}.path"] = _check_agent(name, system, config)
        elif isinstance(system, ResponsesSystem):
            digests[f"{field}.path"] = _digest(system.path.read_bytes())
    return digests


def _check_model(name: str, config: ComparisonConfig) -> dict[str, str]:
    """The LLM of a system is there, if it is not the base one, and its adapter; SHA-256 by setting."""
    llm, adapter = config.llm_of(name)
    field, digests = f"systems.{name}", {}
    if llm != config.llm:
        system = config.systems[name]
        uses_template = not (isinstance(system, CorrectorSystem) and not system.chat_template)
        _in_field(f"{field}.model", lambda: _check_llm(llm, config, uses_template=uses_template))
        digests[f"{field}.model"] = find_digest(llm)
    if adapter is not None:
        check_adapter(adapter, f"{field}.adapter")
        weights = next(adapter / file for file in ADAPTER_WEIGHTS if (adapter / file).is_file())
        content = weights.read_bytes() + (adapter / ADAPTER_CONFIG).read_bytes()
        digests[f"{field}.adapter"] = _digest(content)
    return digests


def _check_llm(llm: LLMConfig, config: ComparisonConfig, *, uses_template: bool = True) -> None:
    """The LLM is there and can read answers of this length."""
    find_hidden_size(llm)
    if uses_template:
        # A system's own model has the template that it comes with.
        check_llm_template(llm, is_settable=llm.model == config.llm.model)
    check_context(AgentUse(llm=llm, decoding=config.decoding))


def _check_agent(name: str, system: AgentSystem, config: ComparisonConfig) -> str:
    """The agent fits the hidden size of its system's LLM; SHA-256 of its files."""
    llm, _ = config.llm_of(name)
    field = f"systems.{name}.path"
    _in_field(field, lambda: check_agent(system.path))
    folder = agent_folder(system.path)
    _, card = _in_field(field, lambda: load_agent(folder, find_hidden_size(llm)))
    warn_of_untrained(card)
    decoding = system.used_in(config.decoding)
    files = [WEIGHTS_FILE, CARD_FILE]
    if (
        _in_field(
            field, lambda: critic_used_in(decoding, folder, find_hidden_size(llm), f"systems.{name}.steering")
        )
        is not None
    ):
        files.append(CRITIC_FILE)
    warn_of_other_use(card, AgentUse(llm=llm, decoding=decoding))
    _warn_of_other_steering(name, system, config.decoding, card)
    return _digest(b"".join((folder / name).read_bytes() for name in files))


def _warn_of_other_steering(
    name: str, system: AgentSystem, decoding: DecodingConfig, card: Mapping[str, Any]
) -> None:
    """Say in one line that an agent is used otherwise than by itself, where its system does not ask for that.

    A card that does not tell, or tells what no settings can be, is not compared.
    """
    try:
        by_itself = system.used_in(DecodingConfig.model_validate(card.get("decoding")))
    except ValidationError:
        return
    used = system.used_in(decoding)
    # Beyond those that there are it is the same how many candidates are compared.
    most = decoding.truncation.top_k
    capped, wanted = (
        way.model_copy(update={"num_compared": min(way.num_compared, most)}) for way in (used, by_itself)
    )
    if capped.how != wanted.how:
        settings = " ".join(_settings_for(wanted, capped, f"systems.{name}"))
        # Of the system's own settings some may be none of that way.
        is_possible = by_itself.conflict is None and not any(
            getattr(system, setting, None) is not None for setting in by_itself.idle
        )
        remedy = f"; for that add {settings}" if is_possible else ""
        warn(f"systems.{name} is used {used.how}, by itself it is used {by_itself.how}{remedy}")


def _settings_for(wanted: DecodingConfig, used: DecodingConfig, field: str) -> Iterator[str]:
    """``key=value`` for the system at ``field`` to be used as ``wanted``, which is now used as ``used``."""
    changed = [setting.removeprefix("decoding.") for setting in steering_settings(wanted, used)]
    for setting in changed:
        if setting.startswith(("steering=", "min_advantage=", "threshold=")):
            yield f"{field}.{setting}"
        elif setting.startswith("num_compared="):
            yield f"decoding.{setting}"  # The same for all systems.
    if wanted.gate != used.gate:
        # A system's gate takes the place of the whole other one.
        parts = [f"{name}={value:g}" for name, value in wanted.gate if value != getattr(GateConfig(), name)]
        yield from (f"{field}.gate.{part}" for part in parts or ["min_salience=0"])


def _check_judges(config: ComparisonConfig) -> dict[str, str]:
    hidden_size = find_hidden_size(config.llm)
    return {
        f"judges.{name}.path": json.dumps(check_scoring_judge(name, judge, hidden_size, config.llm.model))
        for name, judge in config.scoring_judges.items()
    }


def _in_field(field: str, work: Callable[[], Any]) -> Any:
    """What ``work`` returns; what is wrong is said of ``field``."""
    try:
        return work()
    except UserError as error:
        raise UserError(f"{field}: {str(error).removeprefix('llm.model: ')}") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    if not isinstance(content, dict):
        return {prefix: content}
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat
