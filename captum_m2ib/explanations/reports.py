"""What reports of many explanations share: how templates are filled, their style, and that they load nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from captum_m2ib.explanations.embedding import source_of

_STYLE = Path(__file__).with_name("reports.css")


def page_environment(folder: Path, extra: str) -> Any:
    r"""Where templates come from; whatever they show is escaped.

    Args:

        folder (Path): With the templates.
        extra (str): The extra that installs Jinja2 for this page.

    Returns:
        jinja2.Environment: in which an unknown name is an error.

    Raises:
        RuntimeError: if Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise RuntimeError(f"reports need Jinja2: pip install 'captum_m2ib[{extra}]'") from None
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )


def page_style(own: Path) -> str:
    r"""The style that all pages share, and a page's own.

    Args:

        own (Path): The page's own style sheet.

    Returns:
        str: CSS.
    """
    return _STYLE.read_text(encoding="utf-8") + own.read_text(encoding="utf-8")


def trusted(text: str) -> Any:
    r"""Text that is ours, not the data's, and goes into the page as it is.

    Args:

        text (str): CSS, JavaScript, or JSON without what could end its element.

    Returns:
        markupsafe.Markup: the same.
    """
    from markupsafe import Markup  # Comes with Jinja2.

    return Markup(text)


def page_policy(style: str, script: str | None = None) -> str:
    r"""Nothing but the page's own style, script and embedded pictures.

    Args:

        style (str): The page's CSS.
        script (str, optional): Its JavaScript. Default: None (no script runs)

    Returns:
        str: a Content-Security-Policy.
    """
    allowed = "" if script is None else f"script-src {source_of(script)}; "
    return (
        f"default-src 'none'; img-src data:; style-src {source_of(style)}; {allowed}base-uri 'none'; form-action 'none'"
    )
