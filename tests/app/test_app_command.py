"""``captum-m2ib app``: what is said where it cannot be served."""

from __future__ import annotations

import socket
import sys

import pytest
from commands import Run, assert_one_line, runner

from captum_m2ib.app import blocks


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    # What the command sets for Gradio goes with the test.
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    return runner(capsys, monkeypatch, "app")


def test_without_gradio_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_one_line(run(), r"the app needs Gradio \(.*\): pip install 'captum_m2ib\[app\]'")


def test_a_taken_port_is_said(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "import_gradio", lambda: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_one_line(run("--port", port), rf"--port: cannot listen at 127.0.0.1, port {port} \(.*\); choose another")


def test_a_host_that_is_none_is_said(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "import_gradio", lambda: None)
    assert_one_line(run("--host", "no such host"), "--host: there is no address 'no such host'")
