"""What the command line hands to a benchmark: how an encoder is loaded, and how a device is checked."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

from captum_m2ib.encoders.dual_encoder import DualEncoder

Load: TypeAlias = Callable[[argparse.Namespace], DualEncoder]
"""From arguments with ``model`` (and maybe ``revision`` and ``device``) to an encoder."""

CheckDevice: TypeAlias = Callable[[str | None], str | None]
"""Refuses a device that is not there."""
