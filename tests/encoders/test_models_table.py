"""The table of models in the documentation is that of the test matrix."""

from __future__ import annotations

import pytest
from models_table import PAGE, page
from tiny_parts import LEGACY


@pytest.mark.skipif(LEGACY, reason="this transformers lacks families of the table")
def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/models_table.py"
