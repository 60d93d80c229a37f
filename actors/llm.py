"""The frozen LLM: loading it, templating prompts for it, and its hidden states."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from transformers.utils import logging as transformers_logging

from mara.actors import packing
from mara.actors.config import LLMConfig
from mara.actors.decoding.logits import LogitHead, make_logit_head
from mara.common.errors import UserError
from mara.common.extras import install_extra

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"
FINAL_NORM = "applied"
"""Whether hidden states have gone through the model's final norm, in training, in heads and in decoding: they
are what the output embedding reads. Kept beside each agent, which means nothing on other states."""
CASTS = "MatMul8bitLt: inputs will be cast"
"""How bitsandbytes begins a warning that it gives in each layer at each pass, unless the model is in float16.
The cast is part of its method and loses nothing that 8 bits would keep."""
PARTIAL = "partial-"
"""Begins the name of a folder of the cache while it is written; the name that it will have follows."""
NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Names that torch gives to a processor's instructions for bfloat16 (x86, ARM)."""


@dataclass(frozen=True, slots=True)
class LLM:
    """A frozen causal language model with its tokenizer."""

    model: Any
    """The Hugging Face model, in evaluation mode, without gradients."""
    tokenizer: Any
    name: str
    system_prompt: str | None = None
    doubled_bos: bool = False

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return tuple(ids) if isinstance(ids, list) else (int(ids),)

    @property
    def eos_id(self) -> int:
        """The one that the chat template ends an answer with, for answers that others wrote.

        The order of :attr:`eos_ids` says nothing: Llama 3's begin with the token that ends a document.
        """
        ids, own = self.eos_ids, self.tokenizer.eos_token_id
        return int(own) if own in ids else ids[0]

    @property
    def logit_head(self) -> LogitHead:
        """Turns last hidden states into the model's own logits. Made anew each time: keep it in a loop.

        Raises:
            UserError: how the model makes its logits is not known.
        """
        return make_logit_head(self.model)

    def render(self, prompt: str) -> list[int]:
        """Token ids of ``prompt`` in the model's chat template, ready for the answer.

        A model without a chat template gets the plain text with its usual special tokens.

        Raises:
            UserError: the template cannot be filled.
        """
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer(prompt)["input_ids"])
        return self.fill([{"role": "user", "content": prompt}])

    def fill(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the chat template, ready for the answer; behind the system prompt if
        it has none of its own.

        Raises:
            UserError: the template cannot be filled.
        """
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # Templates raise what they like.
            begin = " ".join(messages[-1]["content"].split())[:40]
            raise UserError(
                f"llm.model: the chat template of {self.name} cannot be filled for {begin!r} "
                f"({_first_line(error)}); leave that prompt out, or give another llm.chat_template"
            ) from error
        return list(self.tokenizer(text, add_special_tokens=self.doubled_bos)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @torch.inference_mode()
    def hidden_states(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Last hidden states after the final norm for each sequence: [length, D], in the LLM's dtype.

        One forward pass over all sequences, right-padded; order lengths before to save work.
        """
        longest = max(len(ids) for ids in sequences)
        padded_BL = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask_BL = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, ids in enumerate(sequences):
            padded_BL[row, : len(ids)] = torch.tensor(list(ids))
            mask_BL[row, : len(ids)] = 1
        states_BLD = self.model.base_model(
            input_ids=padded_BL.to(self.device), attention_mask=mask_BL.to(self.device), use_cache=False
        ).last_hidden_state
        return [states_BLD[row, : len(ids)] for row, ids in enumerate(sequences)]


def locate_model(config: LLMConfig, prefix: str = "llm.") -> tuple[str, str | None]:
    """Resolve ``llm.model`` to (name or folder, GGUF file), without loading anything.

    ``prefix`` begins the names of settings in messages: another model may be described like an LLM.

    Raises:
        UserError: the package is not installed or carries no single GGUF file, or the folder has no model.
    """
    if config.model.startswith(PACKAGE_PREFIX):
        package = config.model.removeprefix(PACKAGE_PREFIX)
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{prefix}model: package {package!r} is not installed; correct or install it")
        folder = Path(next(iter(spec.submodule_search_locations)))
        files = [config.gguf_file] if config.gguf_file else sorted(p.name for p in folder.glob("*.gguf"))
        if len(files) != 1 or not (folder / files[0]).is_file():
            raise UserError(
                f"{prefix}model: package {package!r} has the GGUF files {files or 'none'}; "
                f"name one of them in {prefix}gguf_file"
            )
        return str(folder), files[0]
    looks_local = config.model.startswith((".", "/", "~")) or Path(config.model).is_dir()
    if looks_local:
        folder = Path(config.model).expanduser()
        wanted = config.gguf_file or "config.json"
        if not (folder / wanted).is_file():
            raise UserError(
                f"{prefix}model: {folder} has no {wanted}; give the folder of a Hugging Face model"
            )
        return str(folder), config.gguf_file
    return config.model, config.gguf_file


def resolve_device(device: str, field: str = "llm.device") -> torch.device:
    """``auto`` is the first GPU if there is one, else the CPU. ``field`` is the setting that says so.

    Raises:
        UserError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        # The one question that every kind of device answers, and that those which store nothing fail.
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{field}={device} cannot be used here ({_first_line(error)}); use auto, cpu, cuda or cuda:N"
        ) from error
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` is 16 bit where ``device`` has instructions for it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if any(can.get(name) for name in NATIVE_BF16) else torch.float32


def check_quantization(config: LLMConfig) -> None:
    """Refuse ``llm.quantization`` where it cannot be done.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if config.quantization == "none":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"llm.quantization={config.quantization} needs the bitsandbytes package; "
            f"{install_extra('quantized')}, or use none"
        )


def cache_folder() -> Path:
    """Where models of GGUF files are kept unpacked: ``$XDG_CACHE_HOME/mara``, or ``~/.cache/mara``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mara"


def expand_gguf(folder: str, gguf_file: str, dtype: str) -> Path:
    """Return a folder with the model of a GGUF file as safetensors, made on first use.

    Reading GGUF takes half a minute of processor time even for a small model, and packed GGUF kernels
    compute in float32; the expanded copy loads in a second and may be 16 bit. It is kept in
    :func:`cache_folder`, keyed by the file, ``dtype`` and transformers' version.
    Of several processes that want it at once, one makes it and the others wait.
    """
    source = Path(folder) / gguf_file if Path(folder).is_dir() else None
    stat = source.stat() if source else None
    identity = (folder, gguf_file, stat and (stat.st_size, stat.st_mtime_ns), dtype, transformers.__version__)
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()
    cache = cache_folder()
    expanded = cache / f"{Path(gguf_file).stem}-{digest}"
    if expanded.is_dir():
        return expanded
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(expanded):
        if not expanded.is_dir():
            _remove_abandoned(expanded)
            logger.info("unpacking %s into %s, once for this machine", gguf_file, expanded)
            _expand(folder, gguf_file, dtype, expanded)
    return expanded


def _remove_abandoned(expanded: Path) -> None:
    """Delete what killed processes left half-written in the cache: every part whose lock nobody holds.

    The caller holds the lock of ``expanded``.
    """
    for partial in expanded.parent.glob(f"{PARTIAL}*"):
        target = partial.with_name(partial.name.removeprefix(PARTIAL))
        is_ours = target == expanded
        with (
            contextlib.suppress(Timeout),
            contextlib.nullcontext() if is_ours else _lock(target, timeout_s=0),
        ):
            shutil.rmtree(partial, ignore_errors=True)  # Another process may have been quicker.


def _lock(expanded: Path, timeout_s: float = -1) -> FileLock:
    """What a process holds while it writes ``expanded``."""
    return FileLock(f"{expanded}.lock", timeout=timeout_s)


def _expand(folder: str, gguf_file: str, dtype: str, expanded: Path) -> None:
    """Write the model of a GGUF file into ``expanded``, which appears whole or not at all."""
    partial = expanded.with_name(PARTIAL + expanded.name)
    partial.mkdir()
    try:
        # The reader draws a progress bar on standard error whatever transformers' settings say.
        with contextlib.redirect_stderr(io.StringIO()), _gguf_read_once():
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=gguf_file,
                dtype=getattr(torch, dtype),
                quantization_config=GgufConfig(dequantize=True),
            )
        tokenizer.save_pretrained(partial)
        # The copy is plain: without this it would be saved, and then read, as a GGUF file.
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(partial)
        partial.rename(expanded)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Have transformers parse a GGUF file once, and make the table of tensor names once.

    By itself it parses the file for the settings, for the tokenizer and for the weights, and makes the table
    for each module: 33 s for SmolLM2 instead of 13. It takes both from the library at each use.
    """
    import gguf

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(reader), functools.cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def load_llm(config: LLMConfig, pack: bool = True, weights: bool = True) -> LLM:
    """Load the LLM, frozen, on its device; on a CPU with packed linear layers if ``pack``.

    Without ``weights`` the model has layers and their sizes alone, on torch's device ``meta``.

    Raises:
        UserError: the model cannot be found or read, or its device is not there.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    check_quantization(config)
    name, gguf_file = locate_model(config)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    options: dict[str, Any] = {"trust_remote_code": False}
    if config.revision is not None:
        options["revision"] = config.revision
    try:
        if gguf_file is not None:
            name = str(expand_gguf(name, gguf_file, str(dtype).removeprefix("torch.")))
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if config.chat_template is not None:
            tokenizer.chat_template = config.chat_template
        if not weights:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, **options))
            return LLM(model, tokenizer, config.model, config.system_prompt, config.doubled_bos)
        if config.quantization != "none":
            logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast)
            options |= {
                "quantization_config": _quantized(config.quantization, dtype),
                "device_map": {"": device},
            }
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except Exception as error:
        # Damaged weights, settings and tokenizers each fail with an error of the library that reads them.
        raise UserError(f"llm.model: {config.model!r} cannot be loaded: {_first_line(error)}") from error
    if config.quantization == "none":
        model.to(device)
    model.eval().requires_grad_(False)
    if pack and device.type == "cpu" and config.quantization == "none" and dtype in packing.TOLERANCE:
        packing.pack_linears(model)
    return LLM(model, tokenizer, config.model, config.system_prompt, config.doubled_bos)


def _is_no_cast(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CASTS)


def _quantized(bits: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
