"""Reading run configurations: YAML, ``key=value`` overrides, and errors a person can act on.

Imports no torch.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mara.common.addresses import HIDDEN, hide_password, hide_passwords, may_hold_password
from mara.common.errors import UserError
from mara.deploy.comparison.config import ComparisonConfig
from mara.deploy.config import DATA_PATH, RUN_NAME, SHIPPED_DIR, RunConfig, resolve_data_path

Settings = TypeVar("Settings", bound=BaseModel)

CONFIGS_DIR = SHIPPED_DIR / "configs"
COMPARISON_KEY = "systems"
"""A configuration with this key describes a comparison, one without it a training."""
INCLUDE_KEY = "include"
"""Names a shipped configuration, whose settings stand below those of the file. Files of users cannot be
included: what a run folder of somebody else names must not be read."""


def is_config(name: str) -> bool:
    """Whether ``name`` is that of a configuration, there or not, and not of a folder."""
    path = Path(name).expanduser()
    if path.is_dir():
        return False
    return path.suffix in (".yaml", ".yml") or path.is_file() or (CONFIGS_DIR / f"{name}.yaml").is_file()


def find_config(name: str, *, is_comparison: bool = False) -> Path:
    """The file ``name``, or the shipped configuration of that name (``quickstart``).

    Args:
        is_comparison: what is wanted, for the names that are offered in place of an unknown one.
    """
    if (path := Path(name).expanduser()).is_file():
        return path
    if (shipped_path := CONFIGS_DIR / f"{name}.yaml").is_file():
        return shipped_path
    shipped = _shipped_names(is_comparison)
    beside = [str(Path(name).with_name(file.name)) for file in path.parent.glob("*.y*ml")]
    if near := difflib.get_close_matches(name, [*shipped, *beside], n=1):
        raise UserError(f"config: no file {name!r}; did you mean {near[0]}?")
    raise UserError(
        f"config: no file {name!r}; give a YAML file or a shipped configuration ({', '.join(shipped)})"
    )


def shipped_configs() -> dict[str, Path]:
    """The files of the shipped configurations by the names that commands take, such as ``paper/compare``."""
    paths = sorted(CONFIGS_DIR.rglob("*.yaml"))
    return {path.relative_to(CONFIGS_DIR).as_posix().removesuffix(".yaml"): path for path in paths}


def near_config(name: str) -> str | None:
    """The shipped comparison that ``name`` may have been meant to be; None if there is none like it."""
    return next(iter(difflib.get_close_matches(name, _shipped_names(is_comparison=True), n=1)), None)


def _shipped_names(is_comparison: bool) -> list[str]:
    configs = shipped_configs().items()
    return [name for name, path in configs if (COMPARISON_KEY in read_content(path)) == is_comparison]


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``path``, apply ``key=value`` overrides in order, and check everything that needs no file.

    Interpolations such as ``${oc.env:REDIS_URL}`` are resolved. Relative data paths belong to the folder
    of ``path``, those of overrides to the current folder.

    Raises:
        UserError: one line for each mistake, naming the field, the value and what is allowed.
    """
    content = read_content(path)
    if COMPARISON_KEY in content:
        raise UserError(f"config: {path} describes a comparison; give it to `mara eval`")
    config = make_settings(RunConfig, content, overrides, folder=path.parent)
    name = name_of_run(config.run.name, path, "run.name")
    run = config.run.model_copy(update={"name": name, "dir": config.run.dir.expanduser().absolute()})
    replay = config.replay
    if replay.from_run is not None:  # Resolved: this run may take the name "latest" from the one it reads.
        replay = replay.model_copy(update={"from_run": replay.from_run.expanduser().resolve()})
    return config.model_copy(update={"run": run, "replay": replay})


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> ComparisonConfig:
    """The settings of a comparison, read as :func:`load_config` reads those of a training.

    Raises:
        UserError: one line for each mistake, naming the field, the value and what is allowed.
    """
    content = read_content(path)
    if COMPARISON_KEY not in content and content.keys() & {"prompts", "rewards"}:
        raise UserError(
            f"config: {path} describes a training; give it to `mara train`, and its run folder to `mara eval`"
        )
    config = make_settings(ComparisonConfig, content, overrides, folder=path.parent)
    return config.model_copy(update={"name": name_of_run(config.name, path, "name")})


def read_content(path: Path) -> dict[Any, Any]:
    """The nested values of a YAML file and of what it includes, interpolations as they stand there.

    Raises:
        UserError: it cannot be read, holds something else, or includes what is not shipped.
    """
    try:
        text = path.read_text()
        content = OmegaConf.to_container(OmegaConf.create(text) if text.strip() else OmegaConf.create())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: {path} cannot be read: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"config: {path} is not valid YAML: {_where_in_file(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"config: {path} must hold 'key: value' lines, not a {type(content).__name__}")
    if INCLUDE_KEY not in content:
        return content
    included, shipped = str(content.pop(INCLUDE_KEY)), shipped_configs()
    if included not in shipped:
        near = difflib.get_close_matches(included, shipped, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(shipped)}"
        raise UserError(f"config: {path}: include: {included!r} is not a shipped configuration; {remedy}")
    return _merged(read_content(shipped[included]), content)


def _merged(below: dict[Any, Any], above: dict[Any, Any]) -> dict[Any, Any]:
    """``below`` with the values of ``above``, group by group; null in the place of a group leaves it out."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(merged.get(key), dict) and value is None:
            del merged[key]
        elif isinstance(merged.get(key), dict) and isinstance(value, dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged


def name_of_run(given: str | None, path: Path, field: str) -> str:
    """What ``field`` says, or the name of the file ``path``.

    Raises:
        UserError: that cannot name a run.
    """
    name = given or path.stem
    if not re.fullmatch(RUN_NAME, name):
        raise UserError(
            f"config: the file's name cannot name the run ({name!r} must match {RUN_NAME}); add {field}=NAME"
        )
    return name


def make_settings(
    model: type[Settings], content: dict[Any, Any], overrides: Sequence[str], folder: Path
) -> Settings:
    """Settings of type ``model`` from nested values with ``key=value`` overrides; strict.

    Args:
        folder: where relative data paths in ``content`` begin. ``content`` itself is changed.

    Raises:
        UserError: one line for each mistake.
    """
    for override in overrides:
        _apply_override(content, override, model)
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
        return model.model_validate_json(
            json.dumps(resolved, default=str), strict=True, context={"folder": folder}
        )
    except OmegaConfBaseException as error:
        raise UserError(f"config: {_one_line(error)}") from error
    except ValidationError as error:
        raise UserError("\n".join(_describe(error, model, resolved))) from error


def dump_comparison(config: ComparisonConfig) -> str:
    """YAML that :func:`load_comparison` reads back as the same settings."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100))


def dump_config(config: RunConfig) -> str:
    """YAML that :func:`load_config` reads back as the same settings, except that passwords are hidden."""
    content = config.model_dump(mode="json", by_alias=True)
    del content["shaping"]["score_weights"]
    shown = [hide_password(url) for url in config.replay.redis_urls]
    content["replay"]["redis_url"] = shown[0] if isinstance(config.replay.redis_url, str) else shown or None
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100))


_PLACE = re.compile(r""" in "<unicode string>", (line \d+, column \d+|position \d+)""")
"""How YAML names the place of a mistake in a text that it was handed without a name."""


def _where_in_file(error: Exception) -> str:
    return _PLACE.sub(r" at \1", _one_line(error))


def _one_line(error: Exception) -> str:
    return hide_passwords(" ".join(str(error).split()))


# Overrides


def _apply_override(content: dict[Any, Any], override: str, model: type[BaseModel]) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        shown = hide_passwords(repr(override))
        raise UserError(f"override {shown} is not of the form key=value, such as rollout.num_actors=4")
    node = content
    for part in parts[:-1]:
        child = node.get(part)
        if not isinstance(child, dict):
            child = node[part] = {}
        node = child
    value = _parse_value(parts, text, model)
    # As in a file that includes another. An empty text may be a variable of the shell that is not set.
    if value is None and text.strip() in ("null", "~") and isinstance(node.get(parts[-1]), dict):
        del node[parts[-1]]
    else:
        node[parts[-1]] = value


_COMMA = re.compile(r",(?![^{]*\})")
"""A comma that is not within ``${…}``, which YAML does not take as an entry of a list."""


def _parse_value(parts: Sequence[str], text: str, model: type[BaseModel]) -> Any:
    """Text as it is where the setting is text, YAML everywhere else; ``1,2`` is a list where one belongs."""
    accepted = list(_types_at(model, parts))
    if not text and parts[-1] == "redis_url":  # A variable of the shell that is not set, most likely.
        raise UserError(f"{'.'.join(parts)} is empty; give an address, or null for a server of the run's own")
    if type(None) in accepted and text in ("null", "~", ""):
        return None
    if DATA_PATH in accepted:
        return resolve_data_path(text, Path.cwd())
    is_list = any(typing.get_origin(kind) is tuple for kind in accepted)
    if str in accepted and is_list and text.startswith("[") and text.endswith("]"):
        return [entry.strip(" '\"") for entry in _COMMA.split(text[1:-1])]
    if {str, Path} & set(accepted) or any(isinstance(kind, str) for kind in accepted):
        return text
    if is_list and not text.startswith("["):
        text = f"[{text}]"
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        shown = HIDDEN if _is_secret(text) else text
        reason = "" if _is_secret(text) else f": {_PLACE.sub('', _one_line(error))}"
        raise UserError(f"{'.'.join(parts)}={shown}: not a YAML value{reason}") from error


# The shape of the settings


def _flatten(annotation: Any) -> Iterator[Any]:
    """The types an annotation admits, with what ``Annotated`` and ``Literal`` carry."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        for inner in typing.get_args(annotation):
            yield from _flatten(inner)
    elif origin is typing.Literal:
        yield from typing.get_args(annotation)
    else:
        yield annotation


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The settings of a model by the names that users write."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _types_at(model: type[BaseModel], parts: Sequence[str]) -> Iterator[Any]:
    """What the setting at a dotted key may be; nothing for an unknown key."""
    name, *rest = parts
    field = _fields(model).get(name)
    if field is None:
        return
    for kind in (*_flatten(field.annotation), *field.metadata):
        if not rest:
            yield kind
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _types_at(kind, rest)
        elif typing.get_origin(kind) is dict:
            for value in _values(kind):
                yield from _types_at(value, rest[1:]) if rest[1:] else (value,)


def _is_required(model: type[BaseModel], key: str) -> bool:
    return any(field.is_required() for field in _fields_at(model, key.split(".")))


def _fields_at(model: type[BaseModel], parts: Sequence[str]) -> Iterator[FieldInfo]:
    """The settings that a dotted key may mean: one, or one of each kind of group."""
    *group, name = parts
    for of in _types_at(model, group) if group else (model,):
        if isinstance(of, type) and issubclass(of, BaseModel) and name in _fields(of):
            yield _fields(of)[name]


def _values(kind: Any) -> list[type[BaseModel]]:
    """The groups of settings that a ``dict`` of them may have as values; none if it holds something else."""
    values = _flatten(typing.get_args(kind)[1])
    return [value for value in values if isinstance(value, type) and issubclass(value, BaseModel)]


def _tag(value: type[BaseModel]) -> str | None:
    """The ``kind`` that tells a group of settings from others in its place; None: there are no others."""
    kind = _fields(value).get("kind")
    return None if kind is None else str(kind.default)


def _keys(model: type[BaseModel], tag: str | None = None, prefix: str = "") -> Iterator[str]:
    """Every dotted key; ``NAME`` stands for a name the user chooses.

    Of groups that are told apart by their kind all are listed, or only that of kind ``tag``.
    """
    for name, field in _fields(model).items():
        yield prefix + name
        for kind in _flatten(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, tag, f"{prefix}{name}.")
            elif typing.get_origin(kind) is dict:
                for value in _values(kind):
                    if tag is None or _tag(value) in (None, tag):
                        yield from _keys(value, tag, f"{prefix}{name}.NAME.")


# Errors


def _describe(error: ValidationError, model: type[BaseModel], content: Mapping[Any, Any]) -> Iterator[str]:
    """One line for each mistake in ``content``: field, value, remedy."""
    for detail in error.errors(include_url=False):
        location, tag = _without_tag(detail["loc"], model)
        path = _dotted(location)
        match detail["type"]:
            case "union_tag_not_found":
                yield f"{path}.kind is missing; add it to the configuration or give {path}.kind=VALUE"
            case "union_tag_invalid":
                yield f"{path}.kind={_show(path, detail['ctx']['tag'])}: {_which_kind(detail['ctx'])}"
            case "extra_forbidden":
                suggestion = _suggest(path, model, tag) + _begin_anew(path, model, tag)
                yield f"{path} is not a setting{_of_kind(tag)}; {suggestion}"
            case "missing":
                near = _near_name(location, model, content)
                meant = "" if near is None else f"did you mean {near}? Otherwise "
                # Of a group a setting in it is given; its kind has a default.
                inside = (key for key in _keys(model) if key.startswith(f"{path}."))
                keys = [key for key in inside if not key.endswith(".kind")]
                given = next((key for key in keys if _is_required(model, key)), next(iter(keys), path))
                yield f"{path} is missing; {meant}add it to the configuration or give {given}=VALUE"
            case "value_error":
                message = detail["msg"].removeprefix("Value error, ")
                yield hide_passwords(message if not path or path in message else f"{path}: {message}")
            case _:
                usual = _usual_range(model, [str(part) for part in location])
                remedy = "" if usual is None else f"; usual is {usual}"
                yield f"{path}={_show(path, detail['input'])}: {_expected(detail)}{remedy}"


_NUMBER = r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)"
_USUAL_RANGE = re.compile(rf"Usual\s+range\s+{_NUMBER}–{_NUMBER}[.;:]")
"""Not where a unit, a condition or another range follows."""


def _usual_range(model: type[BaseModel], parts: Sequence[str]) -> str | None:
    """The usual range of a setting, where its documentation names one by two plain numbers."""
    for field in _fields_at(model, parts):
        if found := _USUAL_RANGE.search(field.description or ""):
            return f"{found[1]} to {found[2]}"
    return None


def _without_tag(
    location: Sequence[int | str], model: type[BaseModel]
) -> tuple[Sequence[int | str], str | None]:
    """A place as the user wrote it, and the kind of the group it is in, which pydantic puts between."""
    for number in range(2, len(location)):
        groups = _types_at(model, [str(part) for part in location[:number]])
        tags = {_tag(group) for group in groups if isinstance(group, type) and issubclass(group, BaseModel)}
        if location[number] in tags:
            return [*location[:number], *location[number + 1 :]], str(location[number])
    return location, None


def _of_kind(tag: str | None) -> str:
    return "" if tag is None else f" of kind {tag}"


def _which_kind(context: Mapping[str, Any]) -> str:
    kinds = re.findall(r"'([^']*)'", context["expected_tags"])
    if near := difflib.get_close_matches(str(context["tag"]), kinds, n=1):
        return f"did you mean {near[0]}?"
    return f"allowed are {', '.join(kinds)}"


def _dotted(location: Sequence[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _show(path: str, value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    if "redis_url" in path or _is_secret(text):
        return HIDDEN
    return text if len(text) <= 80 else text[:77] + "..."


def _is_secret(text: str) -> bool:
    """Whether a value must not be shown: it may be, or hold, the address of a server."""
    return "redis_url" in text or may_hold_password(text)


def _expected(detail: Mapping[str, Any]) -> str:
    if detail["type"] == "literal_error":
        return f"allowed are {detail['ctx']['expected']}"
    message = str(detail["msg"])
    for theirs, ours in (
        ("Input should be", "must be"),
        ("a valid string", "text"),
        ("an object", "a group of settings"),
        ("String should match pattern", "must match"),
    ):
        message = message.replace(theirs, ours, 1)
    return message


def _suggest(path: str, model: type[BaseModel], tag: str | None) -> str:
    known = list(_keys(model, tag))
    parent, _, name = path.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in known if _same_place(key.rpartition(".")[0], parent)]
    if near := difflib.get_close_matches(name, siblings, n=1):
        return f"did you mean {parent + '.' if parent else ''}{near[0]}?"
    if elsewhere := [key for key in known if key.rpartition(".")[2] == name]:
        return f"did you mean {elsewhere[0]}?"
    return f"{parent or 'the top level'} has {', '.join(siblings)}"


def _begin_anew(path: str, model: type[BaseModel], tag: str | None) -> str:
    """How to get what an included configuration has by this name as another kind; empty where ``path`` is a
    setting of no kind."""
    parent, _, name = path.rpartition(".")
    of_others = (key for key in _keys(model) if key.rpartition(".")[2] == name)
    if tag is None or not any(_same_place(key.rpartition(".")[0], parent) for key in of_others):
        return ""
    return f"; if it was there before, give {parent}=null and this kind by another name"


def _near_name(
    location: Sequence[int | str], model: type[BaseModel], content: Mapping[Any, Any]
) -> str | None:
    """Of a setting in a group that the user named: another group beside it, of almost the same name.

    Example: ``rewards.helpful`` for ``rewards.helpfull.path``.
    """
    path = _dotted(location)
    if not any(_same_place(key, path) and key.rpartition(".")[0].endswith(".NAME") for key in _keys(model)):
        return None
    *place, name, _ = location
    siblings: Any = content
    for part in place:
        siblings = siblings[part]
    near = difflib.get_close_matches(str(name), [str(key) for key in siblings if key != name], n=1)
    return _dotted([*place, near[0]]) if near else None


def _same_place(template: str, path: str) -> bool:
    wanted, given = template.split("."), path.split(".")
    return len(wanted) == len(given) and all(w in ("NAME", g) for w, g in zip(wanted, given, strict=True))
