"""Where a call of this package came from, so that a warning points at the user's own line."""

from __future__ import annotations

import inspect


def frames_within() -> int:
    """How many frames up the caller of this package is, counted from whoever asks."""
    frame, count = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("captum_m2ib", "captum"):
        frame, count = frame.f_back, count + 1
    # This function is one of the frames, and not one of the caller's.
    return count - 1
