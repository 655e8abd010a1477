"""tpcompile: a declarative graph-rewriting compiler for tensor parallelism.

``compile`` captures an unmodified model as one graph, cuts it as a short ``.tpspec`` says, and returns this rank's
module; ``verify`` proves, in one process and without a GPU, that outputs and every gradient are unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpcompile.errors import CaptureError, RuntimeMismatchError, ShardingError, SpecError, TpcompileError

if TYPE_CHECKING:
    from tpcompile.checkpoints import load, save
    from tpcompile.compiler import rewrite
    from tpcompile.equivalence import Report, verify
    from tpcompile.exporting import export
    from tpcompile.gradients import clip_grad_norm_, grad_norm
    from tpcompile.module import TensorParallel, compile
    from tpcompile.pipeline import pipeline_stage
    from tpcompile.planner import plan
    from tpcompile.pretrained import from_pretrained
    from tpcompile.program import Program
    from tpcompile.report import Collective
    from tpcompile.spec import Spec
    from tpcompile.whole_state import full_gradients, full_state_dict

_HOMES = {
    "Collective": "tpcompile.report",
    "Program": "tpcompile.program",
    "Report": "tpcompile.equivalence",
    "Spec": "tpcompile.spec",
    "TensorParallel": "tpcompile.module",
    "clip_grad_norm_": "tpcompile.gradients",
    "compile": "tpcompile.module",
    "export": "tpcompile.exporting",
    "from_pretrained": "tpcompile.pretrained",
    "full_gradients": "tpcompile.whole_state",
    "full_state_dict": "tpcompile.whole_state",
    "grad_norm": "tpcompile.gradients",
    "load": "tpcompile.checkpoints",
    "pipeline_stage": "tpcompile.pipeline",
    "plan": "tpcompile.planner",
    "rewrite": "tpcompile.compiler",
    "save": "tpcompile.checkpoints",
    "verify": "tpcompile.equivalence",
}


def __getattr__(name: str) -> Any:
    """Public names on first use (PEP 562), so that ``tpcompile --help`` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tpcompile' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


__all__ = [
    "CaptureError",
    "Collective",
    "Program",
    "Report",
    "RuntimeMismatchError",
    "ShardingError",
    "Spec",
    "SpecError",
    "TensorParallel",
    "TpcompileError",
    "clip_grad_norm_",
    "compile",
    "export",
    "from_pretrained",
    "full_gradients",
    "full_state_dict",
    "grad_norm",
    "load",
    "pipeline_stage",
    "plan",
    "rewrite",
    "save",
    "verify",
]
