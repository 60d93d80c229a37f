"""What an LLM is, found without loading it, and whether two names mean one LLM."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safetensors import SafetensorError, safe_open

from mara.actors.config import LLMConfig
from mara.actors.llm import locate_model
from mara.common.errors import UserError

HUB_TIMEOUT_S = 5.0
WEIGHT_FILES = ("*.safetensors", "*.bin")
_NUM_PARTS, _PART_BYTES = 17, 1 << 20
"""Parts of each file that are read to tell it from another, evenly spread, and their length."""
_ASKED, _TOLD = "qzvxk", "jwqpf"
"""Prompt and system prompt that a chat template is tried with: words that none has by itself."""
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What a chat template may ask a tokenizer for."""


def find_hidden_size(config: LLMConfig) -> int:
    """Hidden size of the LLM, from its ``config.json`` or the header of its GGUF file.

    A Hub model is looked up in the local cache first; otherwise that one file is fetched.

    Raises:
        UserError: the model cannot be found or its description cannot be read.
    """
    description = _description(config)
    if isinstance(description, Path):
        return read_gguf_hidden_size(description)
    try:
        return int(description.hidden_size)
    except (AttributeError, TypeError, ValueError) as error:
        raise _bad_description(config, error) from error


def find_num_positions(config: LLMConfig) -> int | None:
    """The most tokens that the LLM can read, prompt and answer together; None: its description names none.

    Raises:
        UserError: the model cannot be found or its description cannot be read.
    """
    description = _description(config)
    if isinstance(description, Path):
        value = read_gguf_value(description, _GGUF_NUM_POSITIONS)
    else:
        value = getattr(description, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _description(config: LLMConfig) -> Any:
    """The path of the GGUF file, or what ``config.json`` says of the language model."""
    folder, gguf_file = find_folder(config), locate_model(config)[1]
    if gguf_file is not None:
        return folder / gguf_file
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception as error:
        # The description is checked by several libraries, each with errors of its own.
        raise _bad_description(config, error) from error


def _bad_description(config: LLMConfig, error: Exception) -> UserError:
    return UserError(f"llm.model: config.json of {config.model!r} cannot be used: {_first_line(error)}")


def find_folder(config: LLMConfig, prefix: str = "llm.") -> Path:
    """The folder with the description of a model; with its weights, if it is no model of the Hub.

    A Hub model is looked up in the local cache first; otherwise that one file is fetched.

    Args:
        prefix: begins the names of settings in messages: another model may be described like an LLM.

    Raises:
        UserError: the model cannot be found or its weights cannot be read.
    """
    name, gguf_file = locate_model(config, prefix)
    folder = Path(name)
    if not folder.is_dir():
        return _from_hub(config, gguf_file or "config.json", prefix).parent
    if gguf_file is None:
        _check_weights(folder, prefix)
    return folder


class LLMIdentity(NamedTuple):
    """What tells an LLM, as an agent meets it, from others of the same name."""

    commit: str | None
    """Of a Hub model; None for a folder or a package."""
    template_digest: str | None
    """SHA-256, in hex, of the chat template in its tokenizer or GGUF file; None: it has none."""


def find_identity(config: LLMConfig) -> LLMIdentity:
    """Commit and chat template of the LLM.

    Raises:
        UserError: the model or its tokenizer cannot be read.
    """
    folder, commit = _find_commit(config)
    template, _ = _find_template(config, folder)
    if template is None:
        return LLMIdentity(commit, None)
    # A tokenizer with several templates has them by name.
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return LLMIdentity(commit, hashlib.sha256(text.encode()).hexdigest())


def _find_commit(config: LLMConfig) -> tuple[Path, str | None]:
    """The folder with the description of the model, and the commit of a Hub model."""
    name, gguf_file = locate_model(config)
    if Path(name).is_dir():
        return Path(name), None
    folder = _from_hub(config, gguf_file or "config.json").parent
    # The Hub's cache keeps a model in NAME/snapshots/COMMIT.
    return folder, next((at.name for at in (folder, *folder.parents) if at.parent.name == "snapshots"), None)


def check_llm_template(config: LLMConfig, *, is_settable: bool = True) -> None:
    """Fill the LLM's chat template to see whether it can be, and whether it leaves anything out.

    Args:
        is_settable: whether ``llm.chat_template`` can be given for it.

    Raises:
        UserError: it cannot be filled, or the prompt or the system prompt would be lost.
    """
    template, special_tokens = _find_template(config, _find_commit(config)[0])
    is_own = config.chat_template is None
    name = f"llm.model: the chat template of {config.model}" if is_own else "llm.chat_template"
    without = "give llm.system_prompt=null"
    give = [] if not is_own else ["give llm.chat_template"] if is_settable else ["use another model"]
    if template is None:
        if config.system_prompt is not None:
            remedy = ", or ".join([without, *(give if is_settable else [])])
            raise UserError(f"llm.system_prompt: {config.model} has no chat template to put it in; {remedy}")
        return
    if not is_own and "{" not in template:
        raise UserError(
            f"llm.chat_template={template!r} has no {{{{…}}}}; give the text of a template, not its file: "
            'llm.chat_template="$(cat FILE)"'
        )
    if isinstance(template, dict):
        template = template.get("default")
        if template is None:
            raise UserError(f"{name} is one of several, none of them the default; {', or '.join(give)}")
    # As it is asked, for what a template refuses; then with a word that none knows, for what it loses.
    asks_more = config.system_prompt is not None and config.system_prompt.strip()
    for system in [config.system_prompt, _TOLD] if asks_more else [config.system_prompt]:
        try:
            text = _fill(template, system, special_tokens)
        except Exception as error:  # Templates raise what they like.
            ways = [*([without] if system is not None else []), *(give or ["correct it"])]
            reason = _first_line(error)
            raise UserError(f"{name} cannot be filled ({reason}); {', or '.join(ways)}") from error
        if _ASKED not in text:
            remedy = ", or ".join(give) or "have it use {{ messages }}"
            raise UserError(f"{name} leaves out the prompt; {remedy}")
        if system is _TOLD and _TOLD not in text:
            remedy = ", or ".join([without, *(give or ["have it use {{ messages }}"])])
            raise UserError(f"{name} leaves out the system prompt; {remedy}")


def _fill(template: str, system: str | None, special_tokens: Mapping[str, Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": _ASKED}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    (text,), _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, **special_tokens
    )
    return str(text)


def find_digest(config: LLMConfig) -> str:
    """What tells a model's files from others of the same name: the commit of a Hub model; SHA-256 of others.

    It is over names, sizes and parts of the files, since all of a large model would take minutes. Cards
    (``.md``) and hidden files are left out.

    Raises:
        UserError: the model cannot be found.
    """
    name, gguf_file = locate_model(config)
    if not Path(name).is_dir():
        return _find_commit(config)[1] or ""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(name).iterdir() if path.is_file()):
        if path.suffix == ".md" or path.name.startswith("."):  # nothing that is loaded
            continue
        if gguf_file is not None and path.name != gguf_file:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for part in range(_NUM_PARTS):
                file.seek(part * max(0, size - _PART_BYTES) // (_NUM_PARTS - 1))
                digest.update(file.read(_PART_BYTES))
    return digest.hexdigest()


def _find_template(config: LLMConfig, folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """Text, or several by name, or None where there is none; and the special tokens that it may ask for.

    Which ones a GGUF file has is not looked up: all are there.
    """
    name, gguf_file = locate_model(config)
    if gguf_file is not None:
        tokens = {token: f"<{token}>" for token in _SPECIAL_TOKENS}
        return config.chat_template or read_gguf_value(folder / gguf_file, _GGUF_TEMPLATE), tokens
    from transformers import AutoTokenizer

    try:
        options: dict[str, Any] = {"trust_remote_code": False}
        if config.revision is not None:
            options["revision"] = config.revision
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        # As of the description: each library fails in ways of its own.
        raise UserError(
            f"llm.model: the tokenizer of {config.model!r} cannot be loaded: {_first_line(error)}"
        ) from error
    return config.chat_template or tokenizer.chat_template, tokenizer.special_tokens_map


def _check_weights(folder: Path, prefix: str) -> None:
    """Refuse a folder without weights, and safetensors whose header cannot be read."""
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
        raise UserError(f"{prefix}model: {folder} has no weights (*.safetensors); give a complete model")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{prefix}model: {path} cannot be read ({_first_line(error)}); fetch it again"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _from_hub(config: LLMConfig, filename: str, prefix: str = "llm.") -> Path:
    """Path of one file of a Hub model in the cache, fetched if it is not there."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    # What goes wrong is told once, at the end; the client tells of each of its attempts.
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        cached = try_to_load_from_cache(config.model, filename, revision=config.revision)
        if isinstance(cached, str):
            return Path(cached)
        # Where nobody answers, a download tries again for half a minute. This asks once.
        get_hf_file_metadata(
            hf_hub_url(config.model, filename, revision=config.revision), timeout=HUB_TIMEOUT_S
        )
        return Path(
            hf_hub_download(config.model, filename, revision=config.revision, etag_timeout=HUB_TIMEOUT_S)
        )
    except HFValidationError as error:
        raise UserError(
            f"{prefix}model: {config.model!r} is neither a folder nor the name of a Hub model; correct it"
        ) from error
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
            status = error.response.status_code if error.response is not None else "no answer"
            raise UserError(
                f"{prefix}model: the Hub does not give {filename} of {config.model!r} ({status}); check the "
                f"name, {prefix}revision and your access"
            ) from error
        # What the network does arrives as the errors of whichever HTTP library the Hub's client uses.
        raise UserError(
            f"{prefix}model: {config.model!r} is no folder and not in the local cache, and the Hub cannot be "
            f"reached ({_first_line(error)}); correct the name, give a folder, or connect"
        ) from error


# GGUF: magic, version, two counts, then named values. Only what comes before the hidden size is read.
_GGUF_ARRAY, _GGUF_TEXT = 9, 8
_GGUF_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_HIDDEN_SIZE = ".embedding_length"
_GGUF_NUM_POSITIONS = ".context_length"
_GGUF_TEMPLATE = "tokenizer.chat_template"


def read_gguf_hidden_size(path: Path) -> int:
    """The value of ``ARCHITECTURE.embedding_length`` in the header of a GGUF file (version 2 or 3).

    Raises:
        UserError: it is not such a file.
    """
    value = read_gguf_value(path, _GGUF_HIDDEN_SIZE)
    if not isinstance(value, int):
        raise _not_gguf(path, "it names no embedding_length")
    return value


def read_gguf_value(path: Path, ending: str) -> object:
    """The first value in the header of a GGUF file whose name has this ``ending``; None: there is none.

    Raises:
        UserError: it is not such a file.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError("it does not start with GGUF")
            _version, _num_tensors, num_values = struct.unpack("<IQQ", file.read(20))
            for _ in range(num_values):
                name = _read_text(file)
                value = _read_value(file, *struct.unpack("<I", file.read(4)))
                if name.endswith(ending):
                    return value
    except (OSError, ValueError, KeyError, struct.error, OverflowError, MemoryError, RecursionError) as error:
        raise _not_gguf(path, _first_line(error)) from error
    return None


def _not_gguf(path: Path, reason: str) -> UserError:
    return UserError(f"llm.gguf_file: {path} is not a readable GGUF file ({reason}); fetch it again")


def _read_text(file: BinaryIO) -> str:
    (size,) = struct.unpack("<Q", file.read(8))
    return file.read(size).decode("utf-8", errors="replace")


def _read_value(file: BinaryIO, kind: int) -> object:
    """One value; arrays are passed over and come back as None."""
    if kind == _GGUF_TEXT:
        return _read_text(file)
    if kind != _GGUF_ARRAY:
        layout = "<" + _GGUF_FORMATS[kind]
        return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]
    inner, count = struct.unpack("<IQ", file.read(12))
    if inner in _GGUF_FORMATS:
        file.seek(count * struct.calcsize("<" + _GGUF_FORMATS[inner]), 1)
    else:
        for _ in range(count):
            _read_value(file, inner)
    return None


def is_same_llm(recorded: str | None, model: str) -> bool:
    """Whether ``model`` is the one ``recorded``. Of folders the last name counts: a model may have moved."""
    if recorded is None or recorded == model:
        return recorded is not None
    return Path(model).is_dir() and Path(model).name == Path(recorded).name
