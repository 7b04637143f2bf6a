"""The page in a real browser, served by the command: from a picture to its files, and no other machine is asked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from browsing import Visit, needs_browser, visit
from PIL import Image

from captum_m2ib import Explanation

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FrameLocator

pytestmark = [
    needs_browser,
    # Where it must be, as in the phase of .ci/run that installs it, its absence is a failure.
    pytest.mark.skipif(
        importlib.util.find_spec("gradio") is None and "M2IB_NEED_APP" not in os.environ,
        reason="needs the package of the extra app",
    ),
]

# The command, which tells of every machine but this one that it looks up or calls.
COMMAND = """
import signal, sys

# What is started in the background of a shell inherits that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

def heard(event, details):
    if event == "socket.getaddrinfo":
        host = details[0]
    elif event == "socket.connect" and isinstance(details[1], tuple):
        host = details[1][0]
    else:
        return
    if host not in (None, "", "127.0.0.1", "localhost"):
        print("OUTSIDE", host, file=sys.stderr, flush=True)

sys.addaudithook(heard)
from captum_m2ib.cli import main
sys.exit(main(sys.argv[1:]))
"""
# Gradio's client says so whenever an answer has come to its end.
OWN = {"Method not implemented."}


class Server(NamedTuple):
    process: subprocess.Popen[str]
    address: str
    folder: Path
    log: Path

    @property
    def port(self) -> int:
        return int(self.address.rstrip("/").rpartition(":")[2])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("temporary")
    log = folder.parent / "server.log"
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "app", "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.match(r"page +(http://127\.0\.0\.1:\d+/)", line)
    try:
        assert found, (line, log.read_text())
        yield Server(process, found[1], folder, log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def opened(browser: Browser, server: Server) -> Iterator[Visit]:
    with visit(browser, server.address) as page:
        yield page
        assert set(page.complaints) <= OWN
        assert page.requests and all(address.startswith(server.address) for address in page.requests)


def answer_to(opened: Visit, caption: str) -> FrameLocator:
    """The explanation that is shown, once it is that of a caption."""
    frame = opened.page.frame_locator("iframe.explanation")
    frame.locator("h1", has_text=caption).wait_for()
    return frame


def refused(opened: Visit, says: str) -> None:
    """Ask, and be answered with a sentence and nothing else."""
    opened.page.click("#go")
    opened.page.locator("#problem", has_text=re.compile(says)).wait_for()
    assert opened.page.locator("iframe.explanation").count() == 0
    assert not opened.page.locator("#download-png").is_visible()


def hand_in(opened: Visit, path: Path) -> None:
    clear = opened.page.locator("#picture button[aria-label=Clear], #picture button[title=Clear]")
    if clear.count():
        clear.first.click()
    with opened.page.expect_response(lambda response: "/upload" in response.url):
        opened.page.locator("#picture input[type=file]").set_input_files(path)
    opened.page.locator("#picture img").wait_for(state="attached")


def test_one_run_through_the_page(opened: Visit, tmp_path: Path):
    page = opened.page
    assert page.locator("#head p").inner_text() == "the model of drawn scenes that is shipped"
    page.locator("tbody tr", has_text="here is a yellow moon").click()
    page.locator("#picture img").wait_for()
    opened.expect("document.querySelector('#captions textarea').value", "here is a yellow moon")
    page.locator("#captions textarea").fill("here is a yellow moon\na blue star")
    page.click("#go")
    page.locator("#shown", has_text=re.compile(r"explaining|Information bottleneck|Pair Interaction")).wait_for()
    frame = answer_to(opened, "here is a yellow moon")
    told = frame.locator(".check").inner_text()
    assert re.search(r"image map holds: hiding what it marks takes [6-9]\d %.*\ncheck: text map holds", told)

    # The pointer reads a patch, the slider fades the map, and a click on a word shows its patches.
    frame.locator("#view").hover(position={"x": 40, "y": 40})
    assert re.match(r"patch, row 1 of 8, column 1 of 8: [\d.<]+ bits; most with", frame.locator("#read").inner_text())
    frame.locator("#strength").fill("30")
    assert frame.locator(".under").evaluate("node => node.style.opacity") == "0.3"
    frame.locator("#tokens > span", has_text="moon").click()
    assert frame.locator("#title").inner_text() == "what acts together with “moon”"
    # All of it is seen without scrolling inside the frame.
    height = frame.locator("html").evaluate("node => node.scrollHeight")
    box = page.locator("iframe.explanation").bounding_box()
    assert box is not None and box["height"] >= height

    page.locator("#chosen label", has_text="a blue star").click()
    answer_to(opened, "a blue star")

    page.locator("#method input").click()
    page.get_by_role("option", name="legrad").click()
    page.locator("#method", has_text="gradients of attention").wait_for()
    page.click("#go")
    page.locator("#notes", has_text="legrad").wait_for()
    frame = answer_to(opened, "here is a yellow moon")
    assert "relative values" in frame.locator("body").inner_text()

    saved = {}
    for kind in ("png", "html", "json"):
        with page.expect_download() as download:
            page.click(f"#download-{kind}")
        saved[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[kind])
        assert saved[kind].name == f"here_is_a_yellow_moon-legrad.{kind}"
    with Image.open(saved["png"]) as picture:
        assert picture.width > 1000
    found = Explanation.load(saved["json"])
    assert (found.caption, found.settings["method"]) == ("here is a yellow moon", "LeGrad")
    assert found.check_lines[0] in saved["html"].read_text(encoding="utf-8")
    assert json.loads(saved["json"].read_text())["unit"] == "relative"


def test_wrong_input_is_a_sentence(opened: Visit, tmp_path: Path):
    refused(opened, r"^captions: there is none; type one")
    captions = opened.page.locator("#captions textarea")
    captions.fill("a white ring")
    refused(opened, r"^picture: there is none; drop a picture")

    broken, large = tmp_path / "broken.png", tmp_path / "large.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    Image.new("1", (8000, 5000)).save(large)
    hand_in(opened, broken)
    refused(opened, r"^picture: cannot read broken.png as a picture")
    hand_in(opened, large)
    refused(opened, r"^picture: large.png has 8000 x 5000 pixels, more than the 32,000,000 allowed; resize")
    captions.fill("x" * 10_000)
    refused(opened, r"^captions: “x{30}…” has 10,000 characters, more than the 1,000 .* shorten it\.$")

    # And the page goes on.
    opened.page.locator("tbody tr").first.click()
    opened.expect("document.querySelector('#captions textarea').value", "here is a yellow moon")
    opened.page.get_by_label("off").check()
    opened.page.get_by_label("quick").check()
    opened.page.click("#go")
    frame = answer_to(opened, "here is a yellow moon")
    assert frame.locator("#tokens [role=button]").count() == 0
    assert not opened.page.locator("#problem").is_visible()


def test_the_picture_of_the_documentation_can_be_drawn(opened: Visit, server: Server, tmp_path: Path):
    path = Path(__file__).parents[2] / "docs" / "app_picture.py"
    spec = importlib.util.spec_from_file_location("app_picture", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ask(opened.page, server.address)
    module.draw(opened.page, tmp_path / "app.png")
    assert 50_000 < (tmp_path / "app.png").stat().st_size < 250_000


def test_a_phone_needs_no_scrolling_sideways(browser: Browser, server: Server):
    with visit(browser, server.address, phone=True) as opened:
        opened.page.locator("#go").wait_for()
        opened.expect("document.documentElement.scrollWidth", 390)


def test_only_this_machine_is_heard(server: Server):
    # All of 127.0.0.0/8 leads to this machine: whoever listened everywhere would answer.
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", server.port), timeout=10):
        pass
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: elsewhere.example\r\nConnection: close\r\n\r\n")
        assert stranger.makefile("rb").readline().split()[1] == b"421"


def test_at_its_end_nothing_is_left_and_nobody_was_asked(server: Server):
    assert list(server.folder.glob("captum_m2ib_*"))
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    assert not list(server.folder.glob("captum_m2ib_*"))
    log = server.log.read_text()
    assert "OUTSIDE" not in log and "Traceback" not in log, log
