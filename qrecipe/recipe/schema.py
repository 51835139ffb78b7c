"""The recipe format, version 1, as frozen Pydantic tables.

One file is one `RecipeTable` without required keys, since a base can supply them. Required keys and
references between tables are checked after merging, in `recipe`. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from qrecipe.errors.findings import CODES
from qrecipe.registry.arguments import LEAST_FLOAT32

FORMAT = 1

Phase = Literal["ptq", "qat"]
Backend = Literal["x86", "fbgemm", "onednn", "qnnpack", "executorch", "tensorrt"]
Executor = Literal["fx", "eager", "pt2e"]
DType = Literal["int8", "uint8", "int4", "uint4", "int32", "float16", "float32"]
QScheme = Literal[
    "per_tensor_affine",
    "per_tensor_symmetric",
    "per_channel_affine",
    "per_channel_symmetric",
    "per_channel_affine_float_qparams",
]

DTYPE_SPELLINGS: dict[str, DType] = {
    "qint8": "int8",
    "quint8": "uint8",
    "quint4x2": "uint4",
    "qint32": "int32",
}
"""torch's own names of quantized dtypes, which recipes may use too."""

QUANTIZED_RANGE: dict[str, tuple[int, int]] = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int32": (-(2**31), 2**31 - 1),
}
"""The inclusive integer range that each quantized dtype can hold."""


FLOAT = "float"
INHERIT = "inherit"
RESERVED_QCONFIG_NAMES = frozenset({FLOAT, INHERIT})


class Table(BaseModel):
    """A table of a recipe: unknown keys are errors, and values are never coerced."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        return ((key, value) for key, value in super().__repr_args__() if value is not None)


class _OfPlugin(BaseModel):
    """A table with arguments of a plugin."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the plugin, as in TOML."""
        given: dict[str, Any] = _thawed(self.__pydantic_extra__ or {})
        return given


class Constructor(_OfPlugin):
    """A registered name with arguments: ``{ name = "histogram", bins = 2048 }``."""

    name: str


def _short_for(key: str) -> Callable[[object], object]:
    """Reads a text as a table with that key alone."""
    return lambda value: {key: value} if isinstance(value, str) else frozen(value)


def frozen(value: Any) -> Any:
    """The value with lists as tuples."""
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    """A new value with tuples as lists."""
    if isinstance(value, dict):
        return {key: _thawed(item) for key, item in value.items()}
    return list(map(_thawed, value)) if isinstance(value, tuple) else value


_SPELLINGS = Annotated[str, WithJsonSchema({"enum": [*get_args(DType), *DTYPE_SPELLINGS]})]


def _dtype(value: object) -> object:
    return DTYPE_SPELLINGS.get(value, value) if isinstance(value, str) else value


NamedConstructor = Annotated[Constructor, BeforeValidator(_short_for("name"))]


def _key(description: str) -> Any:
    """A key that may be missing."""
    return Field(default=None, description=description)


class TensorSpec(Table, json_schema_extra={"minProperties": 1}):
    """``[tensor.NAME]``: how a tensor is quantized; None if a key is not set."""

    observer: NamedConstructor | None = _key(
        "The observer: a registered name, or a table with its name and arguments. "
        "Not used for dynamic and float tensors."
    )
    fake_quant: NamedConstructor | None = _key(
        "The fake-quant for training (phase = qat): a registered name, or a table with its name "
        "and arguments. The default is fake_quantize."
    )
    dtype: Annotated[DType, BeforeValidator(_dtype, _SPELLINGS)] | None = _key(
        "The type that values are converted to. int4 is int8 limited to -8..7."
    )
    qscheme: QScheme | None = _key(
        "One scale per tensor or per channel, with (affine) or without (symmetric) a zero point."
    )
    quant_min: int | None = _key("The smallest integer, if not that of the dtype.")
    quant_max: int | None = _key("The largest integer, if not that of the dtype.")
    eps: Annotated[float, Field(ge=LEAST_FLOAT32, le=1)] | None = _key("The smallest scale.")
    reduce_range: bool | None = _key(
        "Use half of the range: 7 bits, which do not saturate on any x86 CPU. Activations only."
    )
    is_dynamic: bool | None = _key("Compute the range of each input at run time.")
    inputs_only: bool | None = _key(
        "Round the inputs of sites, and leave their results float. Activations only, with "
        'executor = "pt2e".'
    )

    @property
    def is_symmetric(self) -> bool:
        """Whether its zero points are zero; onednn takes no other weights."""
        return (self.qscheme or "").endswith("symmetric")

    @property
    def is_per_tensor(self) -> bool:
        """Whether one scale serves the whole tensor, as it does without a ``qscheme``."""
        return self.qscheme is None or self.qscheme.startswith("per_tensor")


def quantized_range(spec: TensorSpec) -> tuple[int, int] | None:
    """The inclusive range of integers that a spec uses; None for float dtypes."""
    if spec.dtype not in QUANTIZED_RANGE:
        return None
    low, high = QUANTIZED_RANGE[spec.dtype]
    low = low if spec.quant_min is None else spec.quant_min
    high = high if spec.quant_max is None else spec.quant_max
    return (low // 2, high // 2) if spec.reduce_range else (low, high)


class QConfigTable(Table, json_schema_extra={"minProperties": 1}):
    """``[qconfig.NAME]``: names of tensor specs; without one, the tensor is not quantized."""

    weight: str | None = _key("The tensor spec for weights.")
    activation: str | None = _key("The tensor spec for outputs, and for float inputs.")


_NAMES_TENSORS: dict[str, JsonValue] = {
    "anyOf": [{"required": ["weight"]}, {"required": ["activation"]}]
}
_EITHER_FORM: list[JsonValue] = [
    {"required": ["qconfig"], "not": _NAMES_TENSORS},
    {**_NAMES_TENSORS, "not": {"required": ["qconfig"]}},
]


class RuleTable(Table, json_schema_extra={"oneOf": _EITHER_FORM}):
    """The long form of a rule's value; the short form is a qconfig's name alone."""

    qconfig: str | None = _key("A qconfig, float, or inherit to drop the inherited rule.")
    weight: str | None = _key("A tensor spec for weights, instead of a qconfig.")
    activation: str | None = _key("A tensor spec for outputs, instead of a qconfig.")
    reason: str | None = _key("Why the rule exists; shown in every plan and report.")
    expect: Annotated[int, Field(ge=0)] | None = _key(
        "How many sites the rule must cover; any other number is an error."
    )
    optional: bool = Field(default=False, description="It is not an error if nothing matches.")


RuleValue = Annotated[RuleTable, BeforeValidator(_short_for("qconfig"), str | RuleTable)]


class RulesTable(Table):
    """``[rules]``: which sites are quantized, and how."""

    global_: RuleValue | None = Field(
        default=None, alias="global", description="Everything that no other rule covers."
    )
    module_type: dict[str, RuleValue] = Field(
        default={}, description="Modules by the dotted name of their class, and what they contain."
    )
    function: dict[str, RuleValue] = Field(
        default={}, description="Calls of a function in any spelling: torch.add includes +."
    )
    module_name: dict[str, RuleValue] = Field(
        default={}, description="Modules and calls by name or glob, and what the modules contain."
    )


class BaseReference(Table):
    """A base recipe, optionally pinned to a fingerprint."""

    recipe: str = Field(description="./FILE, ../FILE, builtin:NAME or DISTRIBUTION:NAME.")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = _key(
        "The fingerprint that the base must have."
    )


def _one_or_several(value: object) -> object:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


_Written = str | BaseReference
References = Annotated[
    tuple[Annotated[BaseReference, BeforeValidator(_short_for("recipe"))], ...],
    BeforeValidator(_one_or_several, _Written | list[_Written]),
]
Texts = Annotated[tuple[str, ...], BeforeValidator(frozen)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class CalibrationTable(Table):
    """``[calibration]``: how many batches calibration uses."""

    min_batches: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Fewer batches are an error; fewer than 10 give a warning."
    )
    max_batches: Annotated[int, Field(ge=1)] = Field(
        default=100, description="No more batches are used."
    )


class QatTable(Table):
    """``[qat]``: the schedule of quantization-aware training, relative to the original one."""

    epochs_fraction: Annotated[float, Field(gt=0)] = Field(
        default=0.1, description="Length, as a fraction of the original training."
    )
    learning_rate_fraction: Annotated[float, Field(gt=0)] = Field(
        default=0.01, description="Initial rate, as a fraction of the original initial rate."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the rate changes after that."
    )
    disable_observer_after: Fraction = Field(
        default=0.6, description="Fraction of the steps after which ranges are fixed."
    )
    freeze_batch_norm_after: Fraction = Field(
        default=0.8, description="Fraction of the steps after which BatchNorm statistics are fixed."
    )


class FxTable(Table):
    """``[fx]``: what is traced."""

    roots: Texts = Field(
        default=(),
        description="Modules that are traced and quantized in place; the rest runs unchanged.",
    )
    non_traceable_module_name: Texts = Field(
        default=(), description="Modules, by name, that are not traced and stay float."
    )
    non_traceable_module_class: Texts = Field(
        default=(), description="Modules, by class, that are not traced and stay float."
    )
    preserved_attributes: Texts = Field(
        default=(), description="Attributes of the model that the converted model keeps."
    )


_LISTS_SCHEMA: dict[str, JsonValue] = {
    "anyOf": [
        {"enum": ["auto"]},
        {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
    ]
}
_Lists = Annotated[
    Literal["auto"] | tuple[tuple[str, ...], ...],
    BeforeValidator(frozen),
    WithJsonSchema(_LISTS_SCHEMA),
]
"""Lists of sites, or what the model has."""


class EqualizeTable(Table, json_schema_extra={"minProperties": 1}):
    """``[transform.equalize]``: channels of similar range, by powers of two."""

    by: Literal["activations", "weights"] = Field(
        default="activations",
        description="What a channel's range is: its largest activation in the calibration data, "
        "or its largest weight.",
    )
    chains: _Lists = Field(
        default="auto",
        description="Lists of sites that follow one another, or auto: all chains of the model.",
    )


_ALPHA: dict[str, JsonValue] = {"type": "number", "minimum": 0, "maximum": 1}
_ALPHAS_SCHEMA: dict[str, JsonValue] = {
    "anyOf": [_ALPHA, {"type": "array", "items": _ALPHA, "minItems": 1}]
}


class SmoothTable(Table, json_schema_extra={"minProperties": 1}):
    """``[transform.smooth]``: channels of similar range in what linear layers read."""

    alpha: Annotated[
        tuple[Fraction, ...],
        Field(min_length=1),
        BeforeValidator(_one_or_several),
        WithJsonSchema(_ALPHAS_SCHEMA),
    ] = Field(
        default=(0.7,),
        description="How much of the difference between channels is moved into the weights, from "
        "0 to 1; of a list, each group gets the value that gives its layers the smallest error.",
        json_schema_extra={"default": 0.7},
    )
    groups: _Lists = Field(
        default="auto",
        description="Lists of linear layers that read the same tensor, or auto: all groups of "
        "the model.",
    )


class PluginTable(_OfPlugin):
    """``[transform.NAME]`` of a plugin: its arguments, and whether it is used at all."""

    enabled: bool = Field(default=True, description="false switches off the table of a base.")


class TransformTable(Table):
    """``[transform]``: steps before quantization that keep what the float model computes.

    The tables of plugins are in ``plugins``.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[PluginTable, BeforeValidator(frozen)]]

    equalize: EqualizeTable | None = _key("Scale the channels between layers.")
    smooth: SmoothTable | None = _key("Scale the channels that linear layers read.")

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        equalizes = self.equalize is not None and bool(self.equalize.chains)
        smooths = self.smooth is not None and bool(self.smooth.groups)
        return equalizes or smooths or bool(self.plugins)

    @property
    def tables(self) -> dict[str, PluginTable]:
        """The tables of plugins, those that are switched off included, by their names."""
        return dict(sorted((self.__pydantic_extra__ or {}).items()))

    @property
    def plugins(self) -> dict[str, PluginTable]:
        """The tables of plugins that are used, by their names."""
        return {name: table for name, table in self.tables.items() if table.enabled}


def _no_error(code: str) -> str:
    """Reject codes of errors; unknown codes pass, as they may be another version's warnings."""
    if code in _ERRORS:
        raise PydanticCustomError("code_of_error", "the code of an error")
    return code


_ERRORS: list[JsonValue] = [code for code, meaning in CODES.items() if meaning.error is not None]
IgnoredCode = Annotated[
    str,
    Field(pattern=r"^QR[0-9]{3}$", json_schema_extra={"not": {"enum": _ERRORS}}),
    AfterValidator(_no_error),
]


class LintTable(Table):
    """``[lint]``: warnings to ignore."""

    ignore: Annotated[tuple[IgnoredCode, ...], BeforeValidator(frozen)] = Field(
        default=(), description="Codes of the warnings."
    )


class RecipeTable(Table):
    """One recipe file."""

    format: Annotated[int, Field(ge=1), WithJsonSchema({"enum": [FORMAT]})] | None = _key(
        "The version of the format."
    )
    name: str | None = _key("The name of the recipe in reports.")
    description: str | None = _key("What the recipe is for.")
    extends: References = Field(default=(), description="A base recipe, or a list of them.")
    phase: Phase | None = _key(
        "Post-training quantization (ptq), or quantization-aware training (qat)."
    )
    backend: Backend | None = _key(
        "The kernels that run the model; executorch and tensorrt are targets for export."
    )
    executor: Executor | None = _key(
        "How the plan is carried out: in FX graph mode (fx), module by module in eager mode "
        "(eager), or with torchao's PT2E on a program of torch.export (pt2e)."
    )
    tensor: dict[str, TensorSpec] = Field(
        default={}, description="How a tensor is quantized, by a name of your choice."
    )
    qconfig: dict[str, QConfigTable] = Field(
        default={},
        description="A pair of weight and activation, by a name of your choice.",
        json_schema_extra={
            "not": {"anyOf": [{"required": [name]} for name in sorted(RESERVED_QCONFIG_NAMES)]}
        },
    )
    rules: RulesTable = RulesTable()
    transform: TransformTable = Field(default_factory=lambda: TransformTable.model_validate({}))
    calibration: CalibrationTable = CalibrationTable()
    qat: QatTable = QatTable()
    fx: FxTable = FxTable()
    lint: LintTable = LintTable()
