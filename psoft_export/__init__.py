"""Take trained PSOFT adapters to deployment.

The two calls most people need:

    >>> import psoft_export
    >>> psoft_export.merge(base="base", adapter="adapter", output="merged")
    >>> psoft_export.load_adapter("adapter")

Names are imported on first use: `import psoft_export` alone does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psoft_export.adapters.adapter import Adapter
    from psoft_export.adapters.kinds import load_adapter
    from psoft_export.algebra.combination import METHODS
    from psoft_export.bank import AdapterBank, BankMemory
    from psoft_export.combining import (
        Combination,
        CombinedModule,
        CombineReport,
        combine,
        plan_merge,
    )
    from psoft_export.errors import PsoftExportError
    from psoft_export.evaluating import LossTable, Sweep, SweepPoint, evaluate, sweep
    from psoft_export.inspection import AdapterSummary, LayerSummary, inspect
    from psoft_export.lora import LoraReport, to_lora
    from psoft_export.manifest import LoraModule, ModuleReport
    from psoft_export.merging import MergeReport, merge
    from psoft_export.pipeline import Progress
    from psoft_export.plan import MergePlan
    from psoft_export.planner import Planner, start_planner
    from psoft_export.publishing import PushReport, push
    from psoft_export.recording import (
        RecordedModule,
        RecordReport,
        check_record,
        convert,
        record,
    )
    from psoft_export.recovering import RecoveryReport, recover
    from psoft_export.recovery.verdict import RecoveredModule
    from psoft_export.swapping import swap
    from psoft_export.training import RecordBasisCallback, record_basis, restore_basis
    from psoft_export.verification.figures import VerificationReport
    from psoft_export.verifying import verify

__all__ = [
    "METHODS",
    "Adapter",
    "AdapterBank",
    "AdapterSummary",
    "BankMemory",
    "Combination",
    "CombineReport",
    "CombinedModule",
    "LayerSummary",
    "LoraModule",
    "LoraReport",
    "LossTable",
    "MergePlan",
    "MergeReport",
    "ModuleReport",
    "Planner",
    "Progress",
    "PsoftExportError",
    "PushReport",
    "RecordBasisCallback",
    "RecordReport",
    "RecordedModule",
    "RecoveredModule",
    "RecoveryReport",
    "Sweep",
    "SweepPoint",
    "VerificationReport",
    "check_record",
    "combine",
    "convert",
    "evaluate",
    "inspect",
    "load_adapter",
    "merge",
    "plan_merge",
    "push",
    "record",
    "record_basis",
    "recover",
    "restore_basis",
    "start_planner",
    "swap",
    "sweep",
    "to_lora",
    "verify",
]

_HOMES = {
    "METHODS": "algebra.combination",
    "Adapter": "adapters.adapter",
    "AdapterSummary": "inspection",
    "AdapterBank": "bank",
    "BankMemory": "bank",
    "Combination": "combining",
    "CombineReport": "combining",
    "CombinedModule": "combining",
    "LayerSummary": "inspection",
    "LoraModule": "manifest",
    "LoraReport": "lora",
    "LossTable": "evaluating",
    "MergePlan": "plan",
    "MergeReport": "merging",
    "ModuleReport": "manifest",
    "Planner": "planner",
    "Progress": "pipeline",
    "PsoftExportError": "errors",
    "PushReport": "publishing",
    "RecordBasisCallback": "training",
    "RecordReport": "recording",
    "RecordedModule": "recording",
    "RecoveredModule": "recovery.verdict",
    "RecoveryReport": "recovering",
    "Sweep": "evaluating",
    "SweepPoint": "evaluating",
    "VerificationReport": "verification.figures",
    "check_record": "recording",
    "combine": "combining",
    "convert": "recording",
    "evaluate": "evaluating",
    "inspect": "inspection",
    "load_adapter": "adapters.kinds",
    "merge": "merging",
    "plan_merge": "combining",
    "push": "publishing",
    "record": "recording",
    "record_basis": "training",
    "recover": "recovering",
    "restore_basis": "training",
    "start_planner": "planner",
    "swap": "swapping",
    "sweep": "evaluating",
    "to_lora": "lora",
    "verify": "verifying",
}


def __getattr__(name: str) -> Any:
    if name == "onnx":
        return import_module("psoft_export.onnx")
    if name not in _HOMES:
        raise AttributeError(f"module 'psoft_export' has no attribute '{name}'")
    value = getattr(import_module(f"psoft_export.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted((*__all__, "onnx"))
