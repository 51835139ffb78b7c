"""Findings, the exceptions that carry them, and the catalogue of codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from qrecipe.errors.short import ShortRepr, short
from qrecipe.errors.text import one_line, printable

Severity = Literal["error", "warning"]
_Error = TypeVar("_Error", bound="QRecipeError")


@dataclass(frozen=True, slots=True, repr=False)
class Location(ShortRepr):
    """A span of text on one line of a recipe file.

    ``line`` and ``column`` count from 1, columns in characters; ``end_column`` is exclusive.
    ``source`` is the whole line, without its line break.
    """

    file: str
    line: int
    column: int
    end_column: int
    source: str = ""

    @property
    def place(self) -> tuple[str, int, int]:
        """Where the span starts, to sort by."""
        return self.file, self.line, self.column

    def __str__(self) -> str:
        return f"{one_line(self.file)}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True, repr=False)
class Finding(ShortRepr):
    """One problem: what is wrong, where, and how to fix it.

    ``key`` is the dotted recipe key at fault if the location is not known yet.
    """

    code: str
    message: str
    location: Location | None = None
    hint: str | None = None
    related: tuple[tuple[str, Location], ...] = ()
    notes: tuple[str, ...] = ()
    key: str | None = None

    @property
    def severity(self) -> Severity:
        return "warning" if CODES[self.code].error is None else "error"

    def __str__(self) -> str:
        head = f"{self.code} {self.message}"
        if self.location is None:
            lines = [head, *([f"  {self.hint}"] if self.hint else [])]
        else:
            lines = [f"{self.location}: {head}", *_excerpt(self.location, self.hint)]
        for text, location in self.related:
            lines += [f"  {text} {location}", *_excerpt(location, None)]
        return printable("\n".join([*lines, *(f"  {note}" for note in self.notes)]))

    def to_json(self) -> dict[str, Any]:
        """The finding as plain JSON values with stable keys."""
        return {
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            "location": None if self.location is None else asdict(self.location),
            "hint": self.hint,
            "related": [{"text": text, **asdict(at)} for text, at in self.related],
            "notes": list(self.notes),
        }


_EXCERPT_WIDTH = 100


def _excerpt(location: Location, hint: str | None) -> list[str]:
    """The source line with a caret under the span, cut to fit a terminal."""
    if not location.source.strip():
        return [f"  {hint}"] if hint else []
    start = min(max(location.column - 1, 0), len(location.source))
    is_long = len(location.source) > _EXCERPT_WIDTH
    cut = max(0, start - _EXCERPT_WIDTH // 2) if is_long else 0
    text = location.source[cut : cut + _EXCERPT_WIDTH].replace("\t", " ")
    width = max(1, min(location.end_column - 1, cut + len(text)) - start)
    gutter = f"{location.line:>5} | "
    caret = " " * (start - cut) + "^" * width
    return [f"{gutter}{text.rstrip()}", f"{'|':>7} {caret}{' ' + hint if hint else ''}"]


SHOWN = 20
"""The most findings that a report shows in full."""


def in_full(findings: Sequence[Finding], whole: str | None = None) -> Iterator[str]:
    """The texts of the first findings, and how many more of each code there are.

    ``whole`` is what has all of them, apart from the output of ``--json``.
    """
    yield from map(str, findings[:SHOWN])
    rest = Counter(finding.code for finding in findings[SHOWN:])
    if rest:
        counts = ", ".join(f"{count} {code} ({CODES[code].title})" for code, count in rest.items())
        has_them = f", and {whole} has them" if whole else ""
        yield f"... and {rest.total()} more: {counts}\n  `--json` shows all of them{has_them}"


class QRecipeError(Exception):
    """Base class of all errors that the library raises; ``findings`` has the details."""

    def __init__(self, findings: Finding | Sequence[Finding]) -> None:
        self.findings: tuple[Finding, ...] = (
            (findings,) if isinstance(findings, Finding) else tuple(findings)
        )
        super().__init__(self.findings)

    @classmethod
    def of(
        cls: type[_Error],
        code: str,
        message: str,
        location: Location | None = None,
        hint: str | None = None,
        *,
        notes: tuple[str, ...] = (),
        key: str | None = None,
    ) -> _Error:
        """The error with one finding."""
        return cls(Finding(code, message, location, hint, notes=notes, key=key))

    def __str__(self) -> str:
        return "\n".join(in_full(self.findings, "`findings` of this error"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({short(self.findings)})"


class RecipeError(QRecipeError):
    """The recipe itself is at fault."""


class RecipeSyntaxError(RecipeError):
    """The recipe is not valid TOML."""


class SchemaError(RecipeError):
    """A key or value that the recipe format does not allow."""


class RecipeReferenceError(RecipeError):
    """``extends`` or a path that is missing, circular or outside the tree."""


class RecipeConflictError(RecipeError):
    """Two bases set the same key differently."""


class UnknownNameError(RecipeError):
    """A name that is not registered, not defined or not known to torch."""


class PluginError(QRecipeError):
    """A registered observer or fake-quant that breaks the contract."""


class PlanError(QRecipeError):
    """The recipe does not fit the model; ``plan`` is the complete plan if there is one."""

    def __init__(self, findings: Finding | Sequence[Finding], plan: Any = None) -> None:
        super().__init__(findings)
        self.plan = plan


class UnmatchedRuleError(PlanError):
    """A rule that matches nothing, or not the expected number of sites."""


class UnsupportedError(PlanError):
    """A rule that the backend cannot honour."""


class ConflictError(PlanError):
    """Two rules that decide the same site differently."""


class TraceError(PlanError):
    """The model cannot be traced symbolically."""


class ExecutionError(QRecipeError):
    """Running the plan failed."""


class CalibrationError(ExecutionError):
    """Calibration data is missing or unusable."""


class AuditError(ExecutionError):
    """The converted model does not match the plan."""


class ArtifactError(QRecipeError):
    """A stored model that cannot be read or does not match."""


class QRecipeWarning(UserWarning):
    """Legal but doubtful; the text starts with the code of the finding."""


@dataclass(frozen=True, slots=True)
class Code:
    """The meaning of a code; ``error`` is the exception it raises, None for a warning."""

    title: str
    error: type[QRecipeError] | None = None


CODES: dict[str, Code] = {
    # reading
    "QR001": Code("the recipe cannot be read", RecipeReferenceError),
    "QR002": Code("the recipe is too large", RecipeSyntaxError),
    "QR003": Code("the recipe is not UTF-8 text", RecipeSyntaxError),
    "QR004": Code("invalid TOML syntax", RecipeSyntaxError),
    "QR005": Code("the recipe is nested too deeply", RecipeSyntaxError),
    # format
    "QR101": Code("unknown key", SchemaError),
    "QR102": Code("invalid value", SchemaError),
    "QR103": Code("missing key", SchemaError),
    "QR104": Code("unknown observer or fake-quant", UnknownNameError),
    "QR105": Code("unknown argument of an observer or fake-quant", UnknownNameError),
    "QR106": Code("invalid argument of an observer or fake-quant", SchemaError),
    "QR107": Code("undefined tensor or qconfig", UnknownNameError),
    "QR108": Code("unknown module type or function", UnknownNameError),
    "QR109": Code("settings that contradict each other", SchemaError),
    "QR110": Code("invalid name pattern", SchemaError),
    "QR111": Code("recipe for a newer qrecipe", SchemaError),
    # composition
    "QR120": Code("base recipe not found", RecipeReferenceError),
    "QR121": Code("recipes extend each other in a cycle", RecipeReferenceError),
    "QR122": Code("base recipe outside the tree", RecipeReferenceError),
    "QR123": Code("base recipe differs from its pin", RecipeReferenceError),
    "QR124": Code("bases contradict each other", RecipeConflictError),
    "QR125": Code("nothing to inherit", RecipeReferenceError),
    # plugins
    "QR150": Code("the class breaks the contract of its kind", PluginError),
    "QR151": Code("the name is taken", PluginError),
    "QR152": Code("a plugin cannot be loaded", PluginError),
    "QR153": Code("a plugin does not register its name", PluginError),
    "QR154": Code("several distributions claim the same name", PluginError),
    "QR155": Code("a plugin registers another plugin's name", PluginError),
    "QR156": Code("a plugin claims a built-in name"),
    "QR157": Code("an observer that cannot be merged over ranks", PluginError),
    # doubtful
    "QR200": Code("torch version outside the tested range"),
    "QR201": Code("few calibration batches"),
    "QR202": Code("the model was in training mode"),
    "QR203": Code("low accuracy explained by the scheme"),
    "QR204": Code("the CPU may saturate"),
    "QR226": Code("kernels that could not be checked on this CPU"),
    "QR205": Code("forward behaves differently in training mode"),
    "QR206": Code("branches with very different ranges share one scale"),
    "QR207": Code("a kernel that is slower than float"),
    "QR208": Code("a model so small that int8 can be slower"),
    "QR209": Code("rule for a class that only has subclasses in the model"),
    "QR210": Code("a model that cannot be traced is quantized in eager mode"),
    "QR212": Code("the measurement was interrupted"),
    "QR213": Code("the current range was found by another observer"),
    "QR214": Code("qconfig that no rule uses"),
    "QR215": Code("tensor that no rule uses"),
    "QR216": Code("pattern that matches every module"),
    "QR217": Code("rule that decides nothing"),
    "QR218": Code("the search for a recipe was interrupted"),
    "QR219": Code("no recipe within the accuracy budget"),
    "QR222": Code("a transform without anything to do"),
    "QR221": Code("almost nothing is quantized"),
    "QR230": Code("hooks on a module that is traced through"),
    "QR231": Code("a root whose calls differ too much for one set of ranges"),
    "QR232": Code("a moving average dominated by the first batches"),
    "QR233": Code("ranges that clip calibration data"),
    "QR234": Code("few batches for a moving average"),
    "QR235": Code("a model that is fixed to one batch size"),
    "QR236": Code("moving averages over the batches of several ranks"),
    "QR237": Code("a mask that takes the range of an int8 sum"),
    "QR238": Code("rule on calls that are fused into another group"),
    # plan
    "QR301": Code("rule matches nothing", UnmatchedRuleError),
    "QR302": Code("rule does not match the expected number of sites", UnmatchedRuleError),
    "QR303": Code("rule cannot be honoured", UnsupportedError),
    "QR304": Code("rules contradict each other", ConflictError),
    "QR305": Code("the model cannot be traced", TraceError),
    "QR306": Code("the model cannot be quantized as it is", PlanError),
    "QR307": Code("example inputs do not fit the model", PlanError),
    "QR308": Code("the phase does not fit the call", PlanError),
    "QR309": Code("backend not available", UnsupportedError),
    "QR310": Code("no such site, member or module", PlanError),
    "QR311": Code("an observer or fake-quant cannot be created", UnsupportedError),
    "QR312": Code("a module that training cannot share", UnsupportedError),
    "QR313": Code("the training schedule does not fit", PlanError),
    "QR314": Code("an attribute that cannot be preserved", PlanError),
    "QR315": Code("a plan that cannot be read back", PlanError),
    "QR316": Code("the executor cannot carry out the recipe", UnsupportedError),
    "QR317": Code("executor not available", UnsupportedError),
    "QR318": Code("the plan needs another CPU", UnsupportedError),
    "QR319": Code("unknown target CPU", UnsupportedError),
    # lock files
    "QR320": Code("no lock file", PlanError),
    "QR321": Code("the lock file is damaged", PlanError),
    "QR322": Code("lock file of a newer qrecipe", PlanError),
    "QR323": Code("the plan differs from its lock file", PlanError),
    "QR324": Code("lock file of a different recipe", PlanError),
    # writing recipes
    "QR330": Code("the float model has no usable accuracy", ExecutionError),
    "QR331": Code("a log of other work", ExecutionError),
    "QR332": Code("a log cannot be read or written", ExecutionError),
    "QR333": Code("invalid search bounds", ExecutionError),
    "QR335": Code("nothing to quantize", UnsupportedError),
    # transforms
    "QR340": Code("a chain that the model does not have", PlanError),
    "QR341": Code("a group that the model does not have", PlanError),
    "QR342": Code("a transform that cannot be undone", PlanError),
    # execution
    "QR401": Code("no calibration data", CalibrationError),
    "QR402": Code("a batch that the model does not accept", CalibrationError),
    "QR403": Code("a batch with NaN or infinity", CalibrationError),
    "QR404": Code("observers without usable ranges", CalibrationError),
    "QR405": Code("conversion failed", ExecutionError),
    "QR406": Code("not a model prepared by qrecipe", CalibrationError),
    "QR408": Code("a transform without batches", CalibrationError),
    "QR407": Code("not enough memory", ExecutionError),
    "QR409": Code("ranks that do not agree", CalibrationError),
    "QR410": Code("the converted model differs from the plan", AuditError),
    "QR411": Code("a kernel gives wrong results", AuditError),
    "QR412": Code("the converted model is worse than its reference", AuditError),
    "QR413": Code("the converted model does not run", AuditError),
    "QR414": Code("an exported model gives different results", AuditError),
    "QR415": Code("an exported file that was not compared"),
    "QR418": Code("a transform fails", ExecutionError),
    "QR417": Code("a transform changes what the float model computes", AuditError),
    "QR416": Code("a kernel saturates", AuditError),
    # measuring
    "QR420": Code("the converted model was made from a different model", ArtifactError),
    "QR421": Code("a plot cannot be written", QRecipeError),
    "QR422": Code("nothing to rank", ExecutionError),
    "QR423": Code("the user's measure does not return a number", ExecutionError),
    "QR424": Code("the memory limit is too small", ExecutionError),
    "QR425": Code("arguments that contradict each other", ExecutionError),
    "QR426": Code("what workers need cannot be sent", ExecutionError),
    "QR427": Code("a worker that cannot compute what this process computes", ExecutionError),
    "QR428": Code("the workers of a pool failed", ExecutionError),
    "QR430": Code("a model without stored ranges", ExecutionError),
    "QR431": Code("a report cannot be written", QRecipeError),
    # artifacts and the command line
    "QR501": Code("not a quantized model saved by qrecipe", ArtifactError),
    "QR502": Code("a stored model cannot be read or written", ArtifactError),
    "QR503": Code("not a complete safetensors file", ArtifactError),
    "QR504": Code("a stored model was damaged or altered", ArtifactError),
    "QR505": Code("missing or invalid metadata in a stored model", ArtifactError),
    "QR506": Code("a stored model from a newer qrecipe", ArtifactError),
    "QR507": Code("a stored model of a different architecture", ArtifactError),
    "QR508": Code("tensors of a stored model are missing or have the wrong shape", ArtifactError),
    "QR509": Code("invalid scale or zero point in a stored model", ArtifactError),
    "QR510": Code("a stored model that cannot run here", ArtifactError),
    "QR511": Code("a model that cannot be stored", ArtifactError),
    "QR512": Code("a model that cannot be exported", ArtifactError),
    "QR601": Code("the model or the data cannot be loaded", QRecipeError),
    "QR602": Code("a package is missing", QRecipeError),
}


def error_from(findings: Iterable[Finding], plan: Any = None) -> QRecipeError:
    """The exception for some findings: their class, or the nearest common base class."""
    found = tuple(findings)
    kinds = [kind for finding in found if (kind := CODES[finding.code].error) is not None]
    common: Any = next(base for base in kinds[0].__mro__ if all(issubclass(k, base) for k in kinds))
    error: QRecipeError = common(found, plan) if issubclass(common, PlanError) else common(found)
    return error
