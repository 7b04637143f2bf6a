"""The command line as tests call it: in this process, offline, with what it returns and prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from captum_m2ib.cli import main


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]


def runner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *first: Any) -> Run:
    """Calls the command with these arguments and those of the call."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: Any) -> Result:
        status = main([str(argument) for argument in (*first, *arguments)])
        return Result(status, *capsys.readouterr())

    return call


def assert_one_line(result: Result, pattern: str) -> None:
    """Refused, in one line that begins like this."""
    assert result.status == 2 and result.out == "" and result.err.count("\n") == 1
    assert re.match(rf"captum-m2ib: {pattern}", result.err), result.err
