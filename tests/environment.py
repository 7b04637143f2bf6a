"""What must be set before anything heavy is imported, here and in child processes."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

STUBS = str(Path(__file__).parent / "stubs")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["PYTHONPATH"] = os.pathsep.join([STUBS, *filter(None, [os.environ.get("PYTHONPATH")])])

if STUBS not in sys.path:
    sys.path.insert(0, STUBS)
importlib.import_module("torchvision_operators")
