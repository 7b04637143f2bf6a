"""Audits: explain every pair of a manifest, lose none, and look at what came out.

``captum-m2ib audit MANIFEST --output DIR`` and ``captum-m2ib report DIR``, or :func:`run_audit` and
:func:`write_report`. Reading and writing tables needs the extra ``audit``; several processes or machines ``ray``.
Names are imported when they are first used, so that the command line does not wait for what it may not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from captum_m2ib._lazy import lazily

if TYPE_CHECKING:
    from captum_m2ib.audit.manifest import Manifest
    from captum_m2ib.audit.report import write_report
    from captum_m2ib.audit.run import Summary, run_audit
    from captum_m2ib.audit.worker import Worker
    from captum_m2ib.audit.writer import read_run, shards

_HOMES = {
    "manifest": ("Manifest",),
    "report": ("write_report",),
    "run": ("Summary", "run_audit"),
    "worker": ("Worker",),
    "writer": ("read_run", "shards"),
}

__all__ = ["Manifest", "Summary", "Worker", "read_run", "run_audit", "shards", "write_report"]

__getattr__, __dir__ = lazily(__name__, _HOMES)
