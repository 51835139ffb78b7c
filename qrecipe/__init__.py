"""A declarative recipe compiler for PyTorch quantization.

Everything public is imported on first use, so that checking a recipe needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qrecipe._version import __version__

if TYPE_CHECKING:
    from qrecipe.artifact.export import export_onnx as export_onnx
    from qrecipe.artifact.loading import load_quantized as load_quantized
    from qrecipe.artifact.saving import save_quantized as save_quantized
    from qrecipe.authoring.suggest import suggest as suggest
    from qrecipe.authoring.tune import tune as tune
    from qrecipe.authoring.tune_result import TuningResult as TuningResult
    from qrecipe.authoring.tune_search import Trial as Trial
    from qrecipe.calibration import calibrate as calibrate
    from qrecipe.errors import ArtifactError as ArtifactError
    from qrecipe.errors import AuditError as AuditError
    from qrecipe.errors import CalibrationError as CalibrationError
    from qrecipe.errors import ConflictError as ConflictError
    from qrecipe.errors import ExecutionError as ExecutionError
    from qrecipe.errors import Finding as Finding
    from qrecipe.errors import PlanError as PlanError
    from qrecipe.errors import PluginError as PluginError
    from qrecipe.errors import QRecipeError as QRecipeError
    from qrecipe.errors import QRecipeWarning as QRecipeWarning
    from qrecipe.errors import RecipeConflictError as RecipeConflictError
    from qrecipe.errors import RecipeError as RecipeError
    from qrecipe.errors import RecipeReferenceError as RecipeReferenceError
    from qrecipe.errors import RecipeSyntaxError as RecipeSyntaxError
    from qrecipe.errors import SchemaError as SchemaError
    from qrecipe.errors import TraceError as TraceError
    from qrecipe.errors import UnknownNameError as UnknownNameError
    from qrecipe.errors import UnmatchedRuleError as UnmatchedRuleError
    from qrecipe.errors import UnsupportedError as UnsupportedError
    from qrecipe.lineage import Provenance as Provenance
    from qrecipe.lineage import provenance as provenance
    from qrecipe.measure.analysis import sensitivity as sensitivity
    from qrecipe.measure.comparison import Comparison as Comparison
    from qrecipe.measure.comparison import compare as compare
    from qrecipe.measure.drift_report import Drift as Drift
    from qrecipe.measure.drifting import drift as drift
    from qrecipe.measure.ranking import Ranking as Ranking
    from qrecipe.pipeline import CompiledRecipe as CompiledRecipe
    from qrecipe.pipeline import compile as compile
    from qrecipe.pipeline import plan as plan
    from qrecipe.pipeline import quantize as quantize
    from qrecipe.planning import Plan as Plan
    from qrecipe.planning import RuleVerdict as RuleVerdict
    from qrecipe.planning import Site as Site
    from qrecipe.qat import QatSchedule as QatSchedule
    from qrecipe.qat import qat_schedule as qat_schedule
    from qrecipe.recipe import Recipe as Recipe
    from qrecipe.recipe import load_recipe as load_recipe
    from qrecipe.recipe import parse_recipe as parse_recipe
    from qrecipe.registry import register_fake_quant as register_fake_quant
    from qrecipe.registry import register_observer as register_observer

_HOME = {
    "ArtifactError": "errors",
    "AuditError": "errors",
    "CalibrationError": "errors",
    "Comparison": "measure.comparison",
    "CompiledRecipe": "pipeline",
    "ConflictError": "errors",
    "Drift": "measure.drift_report",
    "ExecutionError": "errors",
    "Finding": "errors",
    "Plan": "planning",
    "PlanError": "errors",
    "PluginError": "errors",
    "Provenance": "lineage",
    "QatSchedule": "qat",
    "QRecipeError": "errors",
    "QRecipeWarning": "errors",
    "Ranking": "measure.ranking",
    "Recipe": "recipe",
    "RecipeConflictError": "errors",
    "RecipeError": "errors",
    "RecipeReferenceError": "errors",
    "RecipeSyntaxError": "errors",
    "RuleVerdict": "planning",
    "SchemaError": "errors",
    "Site": "planning",
    "TraceError": "errors",
    "Trial": "authoring.tune_search",
    "TuningResult": "authoring.tune_result",
    "UnknownNameError": "errors",
    "UnmatchedRuleError": "errors",
    "UnsupportedError": "errors",
    "calibrate": "calibration",
    "compare": "measure.comparison",
    "compile": "pipeline",
    "drift": "measure.drifting",
    "export_onnx": "artifact.export",
    "load_quantized": "artifact.loading",
    "load_recipe": "recipe",
    "parse_recipe": "recipe",
    "plan": "pipeline",
    "provenance": "lineage",
    "qat_schedule": "qat",
    "quantize": "pipeline",
    "register_fake_quant": "registry",
    "register_observer": "registry",
    "save_quantized": "artifact.saving",
    "sensitivity": "measure.analysis",
    "suggest": "authoring.suggest",
    "tune": "authoring.tune",
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
