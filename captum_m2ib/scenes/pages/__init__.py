"""Drawn pages with exact ground truth, and the compact late-interaction model that finds what stands on them."""

from pathlib import Path

from captum_m2ib.scenes.pages.drawing import KINDS, Item, Page, PageProbe, draw_page, page_probes
from captum_m2ib.scenes.pages.model import build_page_model, build_page_processor, save_page_model
from captum_m2ib.scenes.pages.training import train_pages

PAGES_CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Directory of the trained compact late-interaction model that comes with the package."""

__all__ = [
    "KINDS",
    "PAGES_CHECKPOINT",
    "Item",
    "Page",
    "PageProbe",
    "build_page_model",
    "build_page_processor",
    "draw_page",
    "page_probes",
    "save_page_model",
    "train_pages",
]
