"""A declarative recipe compiler for PyTorch quantization.

Public names are imported on first use, so that checking a recipe does not need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qrecipe._version import __version__

if TYPE_CHECKING:
    from qrecipe.artifact.export.aoti import export_aoti as export_aoti
    from qrecipe.artifact.export.inductor import lower as lower
    from qrecipe.artifact.export.onnx import export_onnx as export_onnx
    from qrecipe.artifact.export.openvino import export_openvino as export_openvino
    from qrecipe.artifact.export.pt2 import export_pt2 as export_pt2
    from qrecipe.artifact.export.pte import export_pte as export_pte
    from qrecipe.artifact.export.targets import export_stored as export_stored
    from qrecipe.artifact.loading import load_quantized as load_quantized
    from qrecipe.artifact.saving import save_quantized as save_quantized
    from qrecipe.audit.sqnr import Fidelity as Fidelity
    from qrecipe.authoring.fastest.fastest import fastest as fastest
    from qrecipe.authoring.fastest.result import Fastest as Fastest
    from qrecipe.authoring.suggest.suggest import suggest as suggest
    from qrecipe.authoring.tune.estimates import SiteCost as SiteCost
    from qrecipe.authoring.tune.levers import Candidate as Candidate
    from qrecipe.authoring.tune.levers import Lever as Lever
    from qrecipe.authoring.tune.result import TuningResult as TuningResult
    from qrecipe.authoring.tune.search import Trial as Trial
    from qrecipe.authoring.tune.tune import tune as tune
    from qrecipe.deployment.bench import bench as bench
    from qrecipe.deployment.result import Bench as Bench
    from qrecipe.deployment.result import BenchRow as BenchRow
    from qrecipe.deployment.verdict import Distances as Distances
    from qrecipe.deployment.ways import Kernels as Kernels
    from qrecipe.errors.findings import ArtifactError as ArtifactError
    from qrecipe.errors.findings import AuditError as AuditError
    from qrecipe.errors.findings import CalibrationError as CalibrationError
    from qrecipe.errors.findings import ConflictError as ConflictError
    from qrecipe.errors.findings import ExecutionError as ExecutionError
    from qrecipe.errors.findings import Finding as Finding
    from qrecipe.errors.findings import Location as Location
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
    from qrecipe.execution.batches import Forward as Forward
    from qrecipe.execution.calibration import calibrate as calibrate
    from qrecipe.execution.provenance import Provenance as Provenance
    from qrecipe.execution.provenance import provenance as provenance
    from qrecipe.execution.qat_schedule import QatSchedule as QatSchedule
    from qrecipe.execution.qat_schedule import qat_schedule as qat_schedule
    from qrecipe.measure.compare.comparison import Comparison as Comparison
    from qrecipe.measure.compare.comparison import SiteComparison as SiteComparison
    from qrecipe.measure.compare.comparison import compare as compare
    from qrecipe.measure.drift.distribution import Histogram as Histogram
    from qrecipe.measure.drift.drift import drift as drift
    from qrecipe.measure.drift.report import Drift as Drift
    from qrecipe.measure.drift.report import SiteDrift as SiteDrift
    from qrecipe.measure.drift.stored_ranges import QRange as QRange
    from qrecipe.measure.profile.profile import profile as profile
    from qrecipe.measure.profile.report import Conditions as Conditions
    from qrecipe.measure.profile.report import Profile as Profile
    from qrecipe.measure.profile.report import ProfiledBoundary as ProfiledBoundary
    from qrecipe.measure.profile.report import ProfiledSite as ProfiledSite
    from qrecipe.measure.profile.timing import Timing as Timing
    from qrecipe.measure.sensitivity.rank import sensitivity as sensitivity
    from qrecipe.measure.sensitivity.ranking import RankedSite as RankedSite
    from qrecipe.measure.sensitivity.ranking import Ranking as Ranking
    from qrecipe.measure.sensitivity.scores import Metric as Metric
    from qrecipe.measure.sensitivity.steps import Evaluate as Evaluate
    from qrecipe.measure.turns import Speed as Speed
    from qrecipe.model.call import Inputs as Inputs
    from qrecipe.observers.registration import register_fake_quant as register_fake_quant
    from qrecipe.observers.registration import register_observer as register_observer
    from qrecipe.pipeline import CompiledRecipe as CompiledRecipe
    from qrecipe.pipeline import compile as compile
    from qrecipe.pipeline import plan as plan
    from qrecipe.pipeline import quantize as quantize
    from qrecipe.planning.plan import Chain as Chain
    from qrecipe.planning.plan import Group as Group
    from qrecipe.planning.plan import Plan as Plan
    from qrecipe.planning.plan import RuleVerdict as RuleVerdict
    from qrecipe.planning.plan import Site as Site
    from qrecipe.planning.plan import Step as Step
    from qrecipe.pool.workers import Pool as Pool
    from qrecipe.recipe.recipe import Ingredient as Ingredient
    from qrecipe.recipe.recipe import QConfigSpec as QConfigSpec
    from qrecipe.recipe.recipe import Recipe as Recipe
    from qrecipe.recipe.recipe import Rule as Rule
    from qrecipe.recipe.recipe import WrittenRule as WrittenRule
    from qrecipe.recipe.recipe import load_recipe as load_recipe
    from qrecipe.recipe.recipe import parse_recipe as parse_recipe
    from qrecipe.recipe.references import Publisher as Publisher
    from qrecipe.recipe.schema import CalibrationTable as CalibrationTable
    from qrecipe.recipe.schema import Constructor as Constructor
    from qrecipe.recipe.schema import EqualizeTable as EqualizeTable
    from qrecipe.recipe.schema import FxTable as FxTable
    from qrecipe.recipe.schema import LintTable as LintTable
    from qrecipe.recipe.schema import PluginTable as PluginTable
    from qrecipe.recipe.schema import QatTable as QatTable
    from qrecipe.recipe.schema import SmoothTable as SmoothTable
    from qrecipe.recipe.schema import TensorSpec as TensorSpec
    from qrecipe.recipe.schema import TransformTable as TransformTable
    from qrecipe.rules.structure import Member as Member
    from qrecipe.rules.structure import ModelStructure as ModelStructure
    from qrecipe.rules.structure import Operation as Operation
    from qrecipe.terminal.progress import Progress as Progress
    from qrecipe.transforms.base import Transform as Transform
    from qrecipe.transforms.base import TransformContext as TransformContext
    from qrecipe.transforms.record import Spread as Spread
    from qrecipe.transforms.record import Transformation as Transformation
    from qrecipe.transforms.record import transformation as transformation
    from qrecipe.transforms.registration import register_transform as register_transform
    from qrecipe.transforms.transform import transform as transform

_NAMES = {
    "artifact.export.aoti": "export_aoti",
    "artifact.export.inductor": "lower",
    "artifact.export.onnx": "export_onnx",
    "artifact.export.openvino": "export_openvino",
    "artifact.export.pt2": "export_pt2",
    "artifact.export.pte": "export_pte",
    "artifact.export.targets": "export_stored",
    "artifact.loading": "load_quantized",
    "artifact.saving": "save_quantized",
    "audit.sqnr": "Fidelity",
    "authoring.fastest.fastest": "fastest",
    "authoring.fastest.result": "Fastest",
    "authoring.suggest.suggest": "suggest",
    "authoring.tune.estimates": "SiteCost",
    "authoring.tune.levers": "Candidate Lever",
    "authoring.tune.result": "TuningResult",
    "authoring.tune.search": "Trial",
    "authoring.tune.tune": "tune",
    "deployment.bench": "bench",
    "deployment.result": "Bench BenchRow",
    "deployment.verdict": "Distances",
    "deployment.ways": "Kernels",
    "errors.findings": (
        "ArtifactError AuditError CalibrationError ConflictError ExecutionError Finding Location "
        "PlanError PluginError QRecipeError QRecipeWarning RecipeConflictError RecipeError "
        "RecipeReferenceError RecipeSyntaxError SchemaError TraceError UnknownNameError "
        "UnmatchedRuleError UnsupportedError"
    ),
    "execution.batches": "Forward",
    "execution.calibration": "calibrate",
    "execution.provenance": "Provenance provenance",
    "execution.qat_schedule": "QatSchedule qat_schedule",
    "measure.compare.comparison": "Comparison SiteComparison compare",
    "measure.drift.distribution": "Histogram",
    "measure.drift.drift": "drift",
    "measure.drift.report": "Drift SiteDrift",
    "measure.drift.stored_ranges": "QRange",
    "measure.profile.profile": "profile",
    "measure.profile.report": "Conditions Profile ProfiledBoundary ProfiledSite",
    "measure.profile.timing": "Timing",
    "measure.sensitivity.rank": "sensitivity",
    "measure.sensitivity.ranking": "RankedSite Ranking",
    "measure.sensitivity.scores": "Metric",
    "measure.sensitivity.steps": "Evaluate",
    "measure.turns": "Speed",
    "model.call": "Inputs",
    "observers.registration": "register_fake_quant register_observer",
    "pipeline": "CompiledRecipe compile plan quantize",
    "planning.plan": "Chain Group Plan RuleVerdict Site Step",
    "pool.workers": "Pool",
    "recipe.recipe": "Ingredient QConfigSpec Recipe Rule WrittenRule load_recipe parse_recipe",
    "recipe.references": "Publisher",
    "recipe.schema": (
        "CalibrationTable Constructor EqualizeTable FxTable LintTable PluginTable QatTable "
        "SmoothTable TensorSpec TransformTable"
    ),
    "rules.structure": "Member ModelStructure Operation",
    "terminal.progress": "Progress",
    "transforms.base": "Transform TransformContext",
    "transforms.record": "Spread Transformation transformation",
    "transforms.registration": "register_transform",
    "transforms.transform": "transform",
}

_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qrecipe' has no attribute {name!r}")
    value = getattr(import_module(f"qrecipe.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
