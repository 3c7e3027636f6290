"""`adapter_config.json`, from whatever wrote it, as one typed value.

Only keys that change the maths are read. Unknown ones are ignored, wrong ones are errors that name the key.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from lmoe_cli.checkpoint.header import lfs_pointer
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.strict_json import parse_object

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1 << 16

LORA = "LORA"
SUPPORTED = {
    LORA: "low-rank A and B per module (Hu et al. 2021)",
    "IA3": "one scale per row or column (Liu et al. 2022)",
    "LOHA": "Hadamard product of two low-rank products (Hyeon-Woo et al. 2021)",
    "LOKR": "Kronecker product (Edalati et al. 2022)",
    "VERA": "scales on shared random projections (Kopiczko et al. 2023)",
}
"""PEFT types that lmoe runs, exactly."""

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` that subtract something from the base before training."""


DEFAULTS: dict[str, dict[str, Any]] = {
    LORA: {"r": 8, "lora_alpha": 8},
    "LOHA": {"r": 8, "alpha": 8},
    "LOKR": {"r": 8, "alpha": 8},
    "VERA": {"r": 256},
}
"""PEFT type → what PEFT takes for a missing key; very old configs rely on it."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds characters that cannot be printed")
    return text


Text = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]
Number = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]


class AdapterConfig(BaseModel):
    """The part of an ``adapter_config.json`` that says what its tensors mean."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    peft_type: Text
    """In capitals, such as ``"LORA"``."""
    base: Text | None = Field(None, alias="base_model_name_or_path")
    """What the adapter says it was trained on. A claim."""
    revision: Text | None = None
    """Of that base, where it says one: a branch, tag or commit."""
    task_type: Text | None = None
    r: Rank | None = None
    lora_alpha: Number | None = None
    alpha: Number | None = None
    rank_pattern: dict[Text, Rank] = {}
    alpha_pattern: dict[Text, Number] = {}
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: Text = "none"
    fan_in_fan_out: bool = False
    init_lora_weights: bool | Text = True
    target_modules: list[Text] | Text | None = None
    target_parameters: list[Text] = []
    feedforward_modules: list[Text] | Text = []
    modules_to_save: list[Text] = []
    assumed_lora: bool = False
    """No ``peft_type`` was there; the keys are those of LoRA."""
    unsupported: tuple[str, ...] = ()
    """Settings that lmoe cannot run, as written."""

    @field_validator("r", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @property
    def default_alpha(self) -> float | None:
        """Alpha of modules that no pattern names, which LoHa and LoKr call ``alpha``; None where there is none."""
        return self.lora_alpha if self.peft_type == LORA else self.alpha

    @property
    def base_changing_init(self) -> str | None:
        """The initialiser that changed the base, if one did."""
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower().startswith(BASE_CHANGING):
            return init
        return "kasa" if "kasa_config" in self.unsupported else None


class ForeignAdapterError(InvalidFileError):
    """A config that is not PEFT's, with the name of what wrote it."""

    def __init__(self, dialect: str, where: str, hint: str) -> None:
        super().__init__("foreign-adapter", f"{where}: {dialect}, not PEFT's format", hint=hint, where=where)
        self.dialect = dialect


def parse_config(data: bytes, where: str) -> AdapterConfig:
    """Read an ``adapter_config.json``.

    Args:
        data: The file's bytes, at most `MAX_CONFIG_BYTES`.
        where: Name of the file, for messages.

    Raises:
        ForeignAdapterError: Written by something else than PEFT.
        InvalidFileError: Not JSON, a Git LFS pointer, or a key with an impossible value.
    """
    if data.startswith(b"version https://git-lfs"):
        raise lfs_pointer(where)
    raw = {key: value for key, value in parse_object(data, where).items() if value is not None and value != ""}
    assumed_lora = "peft_type" not in raw
    if assumed_lora and not {"r", "lora_alpha"} <= raw.keys():
        raise _foreign(raw, where)
    kind = str(raw.get("peft_type", LORA)).upper()
    if kind in SUPPORTED:
        stranger = "alpha" if kind == LORA else "lora_alpha"
        keys = raw.keys() - {stranger}
    else:  # only to be named; its other keys may mean anything
        keys = {"peft_type", "base_model_name_or_path", "revision", "task_type", "target_modules"} & raw.keys()
    told = {"unsupported": _unsupported(raw), "assumed_lora": assumed_lora}
    raw = DEFAULTS.get(kind, {}) | {"peft_type": LORA} | {key: raw[key] for key in keys} | told
    if isinstance(raw["peft_type"], str):
        raw["peft_type"] = kind
    try:
        return AdapterConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = f"{where}: {first['loc'][0]}: {first['msg']}, got {str(first['input'])[:60]!r}"
        raise InvalidFileError(
            "config-invalid", message, hint="mend the file or ask its author", where=where
        ) from error


def _foreign(raw: dict[str, Any], where: str) -> ForeignAdapterError:
    if raw.keys() & {"lora_parameters", "fine_tune_type", "lora_layers"}:
        hint = "convert it to PEFT's format: transposed lora_a and lora_b, alpha = scale x rank"
        return ForeignAdapterError("an MLX adapter (the layout that ollama takes too)", where, hint)
    if {"hidden_size", "model_class"} <= raw.keys():
        return ForeignAdapterError("an adapter of the AdapterHub library", where, "train or convert it with PEFT")
    return ForeignAdapterError("a config without peft_type", where, "name the folder of a PEFT adapter")


def _unsupported(raw: dict[str, Any]) -> tuple[str, ...]:
    """Settings that change the maths in a way that no fixed delta can express."""
    keys = (
        "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config",
        "trainable_token_indices", "arrow_config", "enable_lora",
    )  # fmt: skip
    return tuple(key for key in keys if raw.get(key) not in (None, False, [], {}))
