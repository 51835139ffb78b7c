"""The exception tree, the findings that it carries, and the catalogue of their codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

from qrecipe.errors.text import one_line, printable

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Location:
    """A span of text on one line of a recipe file.

    ``line`` and ``column`` count from 1, columns in characters; ``end_column`` is exclusive.
    ``source`` is the whole line, without its line break.
    """

    file: str
    line: int
    column: int
    end_column: int
    source: str = ""

    def __str__(self) -> str:
        return f"{one_line(self.file)}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or doubtful: what, where, and how to mend it.

    ``key`` is the dotted key of the recipe at fault where only that is known; who has the recipe
    turns it into a ``location``.
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
        """The finding as plain JSON values, with stable keys."""
        return {
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            "location": _location_json(self.location),
            "hint": self.hint,
            "related": [{"text": text, **(_location_json(at) or {})} for text, at in self.related],
            "notes": list(self.notes),
        }


def _location_json(location: Location | None) -> dict[str, Any] | None:
    if location is None:
        return None
    return {
        "file": location.file,
        "line": location.line,
        "column": location.column,
        "end_column": location.end_column,
        "source": location.source,
    }


_EXCERPT_WIDTH = 100


def _excerpt(location: Location, hint: str | None) -> list[str]:
    """The source line and a caret under the span, both cut to fit a terminal."""
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


class QRecipeError(Exception):
    """Base of everything that the library raises; ``findings`` says what and where."""

    def __init__(self, findings: Finding | Sequence[Finding]) -> None:
        self.findings: tuple[Finding, ...] = (
            (findings,) if isinstance(findings, Finding) else tuple(findings)
        )
        super().__init__(self.findings)

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self.findings)


class RecipeError(QRecipeError):
    """The recipe itself is at fault."""


class RecipeSyntaxError(RecipeError):
    """Not a readable TOML text."""


class SchemaError(RecipeError):
    """A key or value that the recipe format does not know."""


class RecipeReferenceError(RecipeError):
    """``extends`` or a path leads nowhere, in a circle, or outside the tree."""


class RecipeConflictError(RecipeError):
    """Two bases set one key differently."""


class UnknownNameError(RecipeError):
    """A name that is not registered, not defined or not known to torch."""


class PluginError(QRecipeError):
    """A registered observer or fake-quant that does not keep the contract."""


class PlanError(QRecipeError):
    """Recipe and model do not fit; ``plan`` is the complete plan where one could be made."""

    def __init__(self, findings: Finding | Sequence[Finding], plan: Any = None) -> None:
        super().__init__(findings)
        self.plan = plan


class UnmatchedRuleError(PlanError):
    """A rule that matches nothing, or not as much as it expects."""


class UnsupportedError(PlanError):
    """A rule that the backend cannot honour."""


class ConflictError(PlanError):
    """Two rules that decide the same site differently."""


class TraceError(PlanError):
    """The model cannot be traced symbolically."""


class ExecutionError(QRecipeError):
    """Running the plan failed."""


class CalibrationError(ExecutionError):
    """Calibration data are missing or unusable."""


class AuditError(ExecutionError):
    """The converted model is not what the plan says."""


class ArtifactError(QRecipeError):
    """A stored model that cannot be read or does not fit."""


class QRecipeWarning(UserWarning):
    """Legal but doubtful; the text starts with the code of the finding."""


@dataclass(frozen=True, slots=True)
class Code:
    """What a code stands for; ``error`` is the class it raises, None for a warning."""

    title: str
    error: type[QRecipeError] | None = field(default=None)


CODES: dict[str, Code] = {
    # reading
    "QR001": Code("the recipe cannot be read", RecipeReferenceError),
    "QR002": Code("the recipe is too large", RecipeSyntaxError),
    "QR003": Code("the recipe is not UTF-8 text", RecipeSyntaxError),
    "QR004": Code("TOML syntax", RecipeSyntaxError),
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
    "QR111": Code("format of a newer qrecipe", SchemaError),
    # composition
    "QR120": Code("base recipe not found", RecipeReferenceError),
    "QR121": Code("recipes extend each other in a circle", RecipeReferenceError),
    "QR122": Code("base recipe outside the tree", RecipeReferenceError),
    "QR123": Code("base recipe differs from its pin", RecipeReferenceError),
    "QR124": Code("bases contradict each other", RecipeConflictError),
    "QR125": Code("nothing to inherit", RecipeReferenceError),
    # plugins
    "QR150": Code("the class breaks the contract of its kind", PluginError),
    "QR151": Code("the name is taken", PluginError),
    "QR152": Code("a plugin cannot be loaded", PluginError),
    "QR153": Code("a plugin does not register its name", PluginError),
    "QR154": Code("several distributions claim one name", PluginError),
    "QR155": Code("a plugin registers the name of another one", PluginError),
    "QR156": Code("a plugin claims a name of torch's own"),
    # doubtful
    "QR200": Code("torch version outside the tested range"),
    "QR201": Code("few calibration batches"),
    "QR202": Code("the model was in training mode"),
    "QR203": Code("low accuracy that the scheme explains"),
    "QR204": Code("the CPU may saturate"),
    "QR226": Code("kernels that this CPU could not judge"),
    "QR205": Code("a forward that does something else in training mode"),
    "QR206": Code("branches of very different range share one scale"),
    "QR207": Code("a kernel that is slower than float"),
    "QR208": Code("a model so small that int8 can be slower"),
    "QR209": Code("rule for a class of which the model has subclasses only"),
    "QR210": Code("a model that cannot be traced is quantized in eager mode"),
    "QR212": Code("the measurement was interrupted"),
    "QR213": Code("a range of today found by another observer"),
    "QR214": Code("qconfig that no rule uses"),
    "QR215": Code("tensor that no rule leads to"),
    "QR216": Code("pattern that matches every module"),
    "QR217": Code("rule that decides nothing"),
    "QR218": Code("the search for a recipe was interrupted"),
    "QR219": Code("no recipe within the accuracy budget"),
    "QR221": Code("next to nothing is quantized"),
    "QR230": Code("hooks on a module that is traced through"),
    "QR231": Code("a root whose calls differ too much for one set of ranges"),
    "QR232": Code("a moving average that clings to the first batches"),
    "QR233": Code("ranges that leave out what calibration saw"),
    "QR234": Code("few batches for a moving average"),
    # plan
    "QR301": Code("rule matches nothing", UnmatchedRuleError),
    "QR302": Code("rule covers another number of sites than expected", UnmatchedRuleError),
    "QR303": Code("rule cannot be honoured", UnsupportedError),
    "QR304": Code("rules contradict each other", ConflictError),
    "QR305": Code("the model cannot be traced", TraceError),
    "QR306": Code("the model cannot be quantized as it is", PlanError),
    "QR307": Code("example inputs do not fit the model", PlanError),
    "QR308": Code("the phase does not fit the call", PlanError),
    "QR309": Code("backend not available", UnsupportedError),
    "QR310": Code("no such site, member or module", PlanError),
    "QR311": Code("an observer or fake-quant cannot be made", UnsupportedError),
    "QR312": Code("a module that training cannot share", UnsupportedError),
    "QR313": Code("the schedule of training does not fit", PlanError),
    "QR314": Code("an attribute that cannot be preserved", PlanError),
    "QR315": Code("a plan that cannot be read back", PlanError),
    "QR318": Code("the plan needs another CPU", UnsupportedError),
    "QR319": Code("unknown target CPU", UnsupportedError),
    # lock files
    "QR320": Code("there is no lock file", PlanError),
    "QR321": Code("the lock file is damaged", PlanError),
    "QR322": Code("lock file of a newer qrecipe", PlanError),
    "QR323": Code("the plan differs from its lock file", PlanError),
    "QR324": Code("lock file of another recipe", PlanError),
    # writing recipes
    "QR330": Code("the float model has no usable accuracy", ExecutionError),
    "QR331": Code("trial log of another search", ExecutionError),
    "QR332": Code("a trial log cannot be read or written", ExecutionError),
    "QR333": Code("bounds of a search that make no sense", ExecutionError),
    "QR335": Code("nothing to quantize", UnsupportedError),
    # execution
    "QR401": Code("no calibration data", CalibrationError),
    "QR402": Code("a batch that the model cannot take", CalibrationError),
    "QR403": Code("a batch with NaN or infinity", CalibrationError),
    "QR404": Code("observers without usable ranges", CalibrationError),
    "QR405": Code("conversion failed", ExecutionError),
    "QR406": Code("not a model that qrecipe prepared", CalibrationError),
    "QR410": Code("the converted model differs from the plan", AuditError),
    "QR411": Code("a kernel computes something else", AuditError),
    "QR412": Code("the converted model is worse than its reference", AuditError),
    "QR413": Code("the converted model does not run", AuditError),
    "QR414": Code("an exported model computes something else", AuditError),
    "QR415": Code("an exported file that was not compared"),
    "QR416": Code("a kernel saturates", AuditError),
    # measuring
    "QR420": Code("the converted model was made from another model", ArtifactError),
    "QR421": Code("a plot cannot be written", QRecipeError),
    "QR422": Code("nothing to rank", ExecutionError),
    "QR423": Code("the user's measure gives no number", ExecutionError),
    "QR424": Code("the memory limit is too small", ExecutionError),
    "QR425": Code("arguments that contradict each other", ExecutionError),
    "QR430": Code("a model without stored ranges", ExecutionError),
    "QR431": Code("a report cannot be written", QRecipeError),
    # artifacts and the command line
    "QR501": Code("not a quantized model of qrecipe", ArtifactError),
    "QR502": Code("a stored model cannot be read or written", ArtifactError),
    "QR503": Code("not a whole safetensors file", ArtifactError),
    "QR504": Code("a stored model was damaged or altered", ArtifactError),
    "QR505": Code("metadata of a stored model are missing or bad", ArtifactError),
    "QR506": Code("a stored model of a newer qrecipe", ArtifactError),
    "QR507": Code("a stored model of another architecture", ArtifactError),
    "QR508": Code("tensors of a stored model are missing or of another shape", ArtifactError),
    "QR509": Code("a stored scale or zero point that cannot be", ArtifactError),
    "QR510": Code("a stored model that cannot run here", ArtifactError),
    "QR511": Code("a model that cannot be stored", ArtifactError),
    "QR512": Code("a model that cannot be exported", ArtifactError),
    "QR601": Code("the model or the data cannot be loaded", QRecipeError),
    "QR602": Code("a package is missing", QRecipeError),
}


def error_from(findings: Iterable[Finding], plan: Any = None) -> QRecipeError:
    """The exception for some findings: their class, or the nearest common one of several."""
    found = tuple(findings)
    kinds = [kind for finding in found if (kind := CODES[finding.code].error) is not None]
    common = reduce(_common_base, kinds)
    if issubclass(common, PlanError):
        return common(found, plan)
    return common(found)


def _common_base(a: type[QRecipeError], b: type[QRecipeError]) -> type[QRecipeError]:
    shared = next(base for base in a.__mro__ if issubclass(b, base))
    return shared if issubclass(shared, QRecipeError) else QRecipeError
