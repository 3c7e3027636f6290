"""Load a base model and its tokenizer with transformers, from files on this machine and nothing else."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmoe_cli.engine.packed import cast, dequantize
from lmoe_cli.errors import InvalidFileError, ResourceError, UsageError, is_out_of_memory
from lmoe_cli.loadout.base import Base

QUANTIZE = ("nf4", "int8")


def load_model(
    base: Base,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a base for inference.

    Args:
        base: Its files are on this machine. One taken as dequantised gets ordinary layers with those weights.
        dtype: Of the weights, and of what is computed.
        device: Where to.
        quantize: ``nf4`` or ``int8`` to quantise it with bitsandbytes while it loads.
        trust_remote_code: Let code of its repository run.

    Returns:
        A causal language model of transformers, in evaluation mode, its parameters frozen.

    Raises:
        InvalidFileError: transformers cannot make a causal language model of it.
        ResourceError: Not enough memory.
        UsageError: bitsandbytes is not installed.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "trust_remote_code": trust_remote_code}
    options["ignore_mismatched_sizes"] = True  # `_require_whole` names them
    if quantize or base.dequantized_from is not None:
        require_bitsandbytes()
    if quantize:
        options["quantization_config"] = _quantization(quantize, dtype)
    if quantize or device.type != "cpu":
        options["device_map"] = {"": device}
    with quietly(), _folder(base) as folder:
        try:
            loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
        except Exception as error:  # a wrong config.json fails with whatever its numbers lead to
            if is_out_of_memory(error):
                hint, message = "--quantize nf4, or another --device", f"{base.ref}: no room on {device}"
                raise ResourceError("out-of-memory", message, hint=hint, where=base.ref) from error
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            message = f"{base.ref}: transformers cannot load it: {reason}"
            hint = "its config.json is wrong or of another version of transformers; download the base again"
            raise InvalidFileError("base-unloadable", message, hint=hint, where=base.ref) from error
    model: nn.Module = loaded[0]
    _require_whole(base, loaded[1])
    if base.quantization or base.dequantized_from is not None:
        cast(model, dtype)
    if base.dequantized_from is not None:
        dequantize(model, dtype)
    return model.eval().requires_grad_(False)


def empty_model(base: Base, *, trust_remote_code: bool = False) -> nn.Module:
    """A model of a base's class without weights: its modules, and the shapes of their parameters.

    Raises:
        InvalidFileError: transformers cannot make a causal language model of its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    code = [name for name in base.files if name.endswith(".py")] if trust_remote_code else []
    folder = base.source.fetch(["config.json", *code])
    with quietly():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except Exception as error:  # as in `load_model`
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            message = f"{base.ref}: transformers cannot make a model of it: {reason}"
            raise InvalidFileError("base-unloadable", message, where=base.ref) from error
    return model


def _require_whole(base: Base, told: Any) -> None:
    """Refuse a base of which transformers would make up a part.

    Raises:
        InvalidFileError: The checkpoint lacks a weight of the model, or has it in another shape.
    """
    missing = sorted(str(name) for name in told["missing_keys"])
    mismatched = sorted(str(entry[0]) for entry in told["mismatched_keys"])
    if missing or mismatched:
        first = (missing or mismatched)[0]
        what = f"lacks {len(missing)} weights" if missing else f"has {len(mismatched)} weights of another shape"
        message = f"{base.ref}: the checkpoint {what} of its model, such as {first}"
        hint = "the download is incomplete, or config.json is that of another model"
        raise InvalidFileError("base-incomplete", message, hint=hint, where=base.ref)


def require_quantized_runs(base: Base, model: nn.Module) -> None:
    """Run one token through a quantised base: on a CPU some shapes load and then have no product.

    To be called when nothing reads the quantised weights any more: the first product packs them for itself.

    Raises:
        UsageError: bitsandbytes cannot run these shapes here.
    """
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    except (AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        message = f"{base.ref}: bitsandbytes cannot run it on this CPU: {reason}"
        hint = "leave --quantize out, or choose a CUDA device"
        raise UsageError("quantize-unsupported", message, hint=hint, where=base.ref) from error


def load_tokenizer(base: Base, *, trust_remote_code: bool = False) -> Any:
    """Load a base's tokenizer.

    Raises:
        InvalidFileError: It has none, or it is broken.
    """
    from transformers import AutoTokenizer

    if not base.has_tokenizer:
        hint = "put the tokenizer files of the original model into its folder"
        raise InvalidFileError("tokenizer-missing", f"{base.ref}: there is no tokenizer", hint=hint, where=base.ref)
    with quietly(), _folder(base) as folder:
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        except Exception as error:  # the tokenizers library raises Exception itself on a broken file
            reason = " ".join(str(error).split())[:200]
            message = f"{base.ref}: its tokenizer cannot be loaded: {reason}"
            raise InvalidFileError("tokenizer-broken", message, where=base.ref) from error


def require_bitsandbytes() -> None:
    """Refuse what needs bitsandbytes where it is not installed.

    Raises:
        UsageError: It is not.
    """
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise UsageError("extra-missing", "bitsandbytes is not installed", hint="pip install 'lmoe-cli[bnb]'")


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


@contextlib.contextmanager
def _folder(base: Base) -> Iterator[Path]:
    """A folder with the base's files. An adapter that lies beside them is left out: transformers would load it too."""
    path = base.source.fetch(base.files)
    if not base.source.has("adapter_config.json"):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lmoe-") as temporary:
        for name in base.files:
            link = Path(temporary, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((path / name).resolve())
        yield Path(temporary)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bars and remarks of libraries."""
    from transformers.utils import logging as remarks

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # for good: it remarks on this CPU at every product
    before, had_bars = remarks.get_verbosity(), remarks.is_progress_bar_enabled()
    remarks.set_verbosity_error()
    remarks.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        remarks.set_verbosity(before)
        if had_bars:
            remarks.enable_progress_bar()
