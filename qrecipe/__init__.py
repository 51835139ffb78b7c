"""A declarative recipe compiler for PyTorch quantization.

Public names are imported on first use, so that checking a recipe does not need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qrecipe._version import __version__

if TYPE_CHECKING:
    from qrecipe.artifact.loading import load_quantized as load_quantized
    from qrecipe.artifact.onnx import export_onnx as export_onnx
    from qrecipe.artifact.saving import save_quantized as save_quantized
    from qrecipe.authoring.suggest.suggest import suggest as suggest
    from qrecipe.authoring.tune.result import TuningResult as TuningResult
    from qrecipe.authoring.tune.search import Trial as Trial
    from qrecipe.authoring.tune.tune import tune as tune
    from qrecipe.errors.findings import ArtifactError as ArtifactError
    from qrecipe.errors.findings import AuditError as AuditError
    from qrecipe.errors.findings import CalibrationError as CalibrationError
    from qrecipe.errors.findings import ConflictError as ConflictError
    from qrecipe.errors.findings import ExecutionError as ExecutionError
    from qrecipe.errors.findings import Finding as Finding
    from qrecipe.errors.findings import PlanError as PlanError
    from qrecipe.errors.findings import PluginError as PluginError
    from qrecipe.errors.findings import QRecipeError as QRecipeError
    from qrecipe.errors.findings import QRecipeWarning as QRecipeWarning
    from qrecipe.errors.findings import RecipeConflictError as RecipeConflictError
    from qrecipe.errors.findings import RecipeError as RecipeError
    from qrecipe.errors.findings import RecipeReferenceError as RecipeReferenceError
    from qrecipe.errors.findings import RecipeSyntaxError as RecipeSyntaxError
    from qrecipe.errors.findings import SchemaError as SchemaError
    from qrecipe.errors.findings import TraceError as TraceError
    from qrecipe.errors.findings import UnknownNameError as UnknownNameError
    from qrecipe.errors.findings import UnmatchedRuleError as UnmatchedRuleError
    from qrecipe.errors.findings import UnsupportedError as UnsupportedError
    from qrecipe.execution.calibration import calibrate as calibrate
    from qrecipe.execution.provenance import Provenance as Provenance
    from qrecipe.execution.provenance import provenance as provenance
    from qrecipe.execution.qat_schedule import QatSchedule as QatSchedule
    from qrecipe.execution.qat_schedule import qat_schedule as qat_schedule
    from qrecipe.measure.compare.comparison import Comparison as Comparison
    from qrecipe.measure.compare.comparison import compare as compare
    from qrecipe.measure.drift.drift import drift as drift
    from qrecipe.measure.drift.report import Drift as Drift
    from qrecipe.measure.sensitivity.rank import sensitivity as sensitivity
    from qrecipe.measure.sensitivity.ranking import Ranking as Ranking
    from qrecipe.observers.registration import register_fake_quant as register_fake_quant
    from qrecipe.observers.registration import register_observer as register_observer
    from qrecipe.pipeline import CompiledRecipe as CompiledRecipe
    from qrecipe.pipeline import compile as compile
    from qrecipe.pipeline import plan as plan
    from qrecipe.pipeline import quantize as quantize
    from qrecipe.planning.plan import Plan as Plan
    from qrecipe.planning.plan import RuleVerdict as RuleVerdict
    from qrecipe.planning.plan import Site as Site
    from qrecipe.recipe.recipe import Recipe as Recipe
    from qrecipe.recipe.recipe import load_recipe as load_recipe
    from qrecipe.recipe.recipe import parse_recipe as parse_recipe

_HOME = {
    "ArtifactError": "errors.findings",
    "AuditError": "errors.findings",
    "CalibrationError": "errors.findings",
    "Comparison": "measure.compare.comparison",
    "CompiledRecipe": "pipeline",
    "ConflictError": "errors.findings",
    "Drift": "measure.drift.report",
    "ExecutionError": "errors.findings",
    "Finding": "errors.findings",
    "Plan": "planning.plan",
    "PlanError": "errors.findings",
    "PluginError": "errors.findings",
    "Provenance": "execution.provenance",
    "QatSchedule": "execution.qat_schedule",
    "QRecipeError": "errors.findings",
    "QRecipeWarning": "errors.findings",
    "Ranking": "measure.sensitivity.ranking",
    "Recipe": "recipe.recipe",
    "RecipeConflictError": "errors.findings",
    "RecipeError": "errors.findings",
    "RecipeReferenceError": "errors.findings",
    "RecipeSyntaxError": "errors.findings",
    "RuleVerdict": "planning.plan",
    "SchemaError": "errors.findings",
    "Site": "planning.plan",
    "TraceError": "errors.findings",
    "Trial": "authoring.tune.search",
    "TuningResult": "authoring.tune.result",
    "UnknownNameError": "errors.findings",
    "UnmatchedRuleError": "errors.findings",
    "UnsupportedError": "errors.findings",
    "calibrate": "execution.calibration",
    "compare": "measure.compare.comparison",
    "compile": "pipeline",
    "drift": "measure.drift.drift",
    "export_onnx": "artifact.onnx",
    "load_quantized": "artifact.loading",
    "load_recipe": "recipe.recipe",
    "parse_recipe": "recipe.recipe",
    "plan": "pipeline",
    "provenance": "execution.provenance",
    "qat_schedule": "execution.qat_schedule",
    "quantize": "pipeline",
    "register_fake_quant": "observers.registration",
    "register_observer": "observers.registration",
    "save_quantized": "artifact.saving",
    "sensitivity": "measure.sensitivity.rank",
    "suggest": "authoring.suggest.suggest",
    "tune": "authoring.tune.tune",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qrecipe' has no attribute {name!r}")
    value = getattr(import_module(f"qrecipe.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
