"""Audits: explain every pair of a manifest, lose none, and look at what came out.

``captum-m2ib audit MANIFEST --output DIR`` and ``captum-m2ib report DIR``, or :func:`run_audit` and
:func:`write_report`. Reading and writing tables needs the extra ``audit``; several processes or machines ``ray``.
Names are imported when they are first used, so that the command line does not wait for what it may not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_m2ib.audit.manifest import Manifest
    from captum_m2ib.audit.report import write_report
    from captum_m2ib.audit.run import Summary, run_audit
    from captum_m2ib.audit.worker import Worker
    from captum_m2ib.audit.writer import read_run, shards

_HOMES = {
    "Manifest": "manifest",
    "Summary": "run",
    "Worker": "worker",
    "read_run": "writer",
    "run_audit": "run",
    "shards": "writer",
    "write_report": "report",
}

__all__ = ["Manifest", "Summary", "Worker", "read_run", "run_audit", "shards", "write_report"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
