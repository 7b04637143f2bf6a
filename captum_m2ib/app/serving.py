"""Serve the page: to this machine alone unless told, with a policy that keeps the browser from asking any other."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from captum_m2ib.app.blocks import import_gradio, make_blocks
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.scenes.example import EXAMPLE_SCENE, example_scene

_HERE = Path(__file__).parent
_FIRST_PORT = 7860
_LARGEST_FILE = "64mb"
_EXAMPLES = (EXAMPLE_SCENE, 3, 5)

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
"""What the browser may load and ask: this server. Gradio's own scripts need the rest of it."""

Message = dict[str, Any]


class Guarded:
    """An ASGI application whose answers carry the policy, and which hears only those who call it by its own name."""

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: tuple[str, ...] | None = None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", ()), *told]}
            await send(message)

        if scope["type"] == "http" and not self._is_called(scope):
            # Another site whose name was made to lead here.
            await send_with_policy({"type": "http.response.start", "status": 421, "headers": []})
            await send({"type": "http.response.body", "body": b"This page is for 127.0.0.1 alone."})
            return
        await self.app(scope, receive, send_with_policy)

    def _is_called(self, scope: Message) -> bool:
        named = re.sub(r":\d+$", "", dict(scope["headers"]).get(b"host", b"").decode("latin-1"))
        return self.hosts is None or named in self.hosts


def serve(encoder: DualEncoder, name: str, host: str, port: int) -> None:
    r"""Serve the page until interrupted.

    Args:

        encoder (DualEncoder): With a processor.
        name (str): What the page calls the model.
        host (str): The address to listen at; at a loopback address only this machine is heard.
        port (int): A free one, as :func:`free_port` finds it.

    Raises:
        ImportError: if Gradio is not installed.
    """
    is_local = _is_loopback(host)
    with tempfile.TemporaryDirectory(prefix="captum_m2ib_") as folder:
        # What is handed in and made lies there alone, and goes with the server.
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "uploads")
        # Gradio calls its own server once, and a proxy must not hear of it.
        for direct in ("NO_PROXY", "no_proxy"):
            os.environ[direct] = ",".join(filter(None, (os.environ.get(direct), "127.0.0.1", "localhost", host)))
        gr = import_gradio()
        from starlette.middleware import Middleware

        made = Path(folder, "made")
        made.mkdir()
        blocks = make_blocks(encoder, name, _drawn_examples(Path(folder)), made)
        hosts = ("127.0.0.1", "localhost", "[::1]", host, f"[{host}]") if is_local else None
        blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=_LARGEST_FILE,
            allowed_paths=[folder],
            app_kwargs={"middleware": [Middleware(Guarded, hosts=hosts)]},
            theme=_theme(gr),
            css=(_HERE / "page.css").read_text(encoding="utf-8"),
            head=f"<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"page     http://{shown}:{port}/ (Ctrl-C ends it)", flush=True)
        if not is_local:
            print("         whoever reaches this address can use the page: there is no password", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("ended", flush=True)
        finally:
            blocks.close(verbose=False)


def _theme(gr: Any) -> Any:
    """Fonts of the machine that looks, and greys that can be read."""
    quiet = {
        "block_info_text_color": "#5c5c66",
        "block_label_text_color": "#3f3f46",
        "body_text_color_subdued": "#5c5c66",
    }
    dark = {f"{name}_dark": "#b4b4bd" for name in quiet}
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    return gr.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"]).set(**quiet, **dark)


def free_port(host: str, port: int | None = None) -> int:
    r"""A port that can be listened at.

    Args:

        host (str): An address of this machine.
        port (int, optional): 0 for any that is free. Default: None (the first free one from 7860)

    Returns:
        int: the port.

    Raises:
        ValueError: if the host is no address of this machine, or the port is out of range or taken.
    """
    candidates = range(_FIRST_PORT, _FIRST_PORT + 100) if port is None else [port]
    if port is not None and not 0 <= port < 65536:
        raise ValueError(f"--port: expected a number from 0 to 65535, got {port}.")
    for candidate in candidates:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                found.bind((host, candidate))
            except socket.gaierror:
                raise ValueError(
                    f"--host: there is no address {host!r}; give one of this machine, as 127.0.0.1."
                ) from None
            except OSError as error:
                reason = error.strerror
                continue
            return int(found.getsockname()[1])
    raise ValueError(f"--port: cannot listen at {host}, port {candidates[0]} ({reason}); choose another one.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _drawn_examples(folder: Path) -> list[tuple[Path, str]]:
    """Drawn scenes, each with a caption of something in it."""
    from PIL import Image

    found = []
    for number in _EXAMPLES:
        path, scene = folder / f"scene_{number}.png", example_scene(number)
        Image.fromarray(scene.image).save(path)
        found.append((path, scene.caption))
    return found
