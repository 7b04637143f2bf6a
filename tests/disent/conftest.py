"""Models trained once on planted patterns, for every test that reads and none that changes them."""

from __future__ import annotations

import pytest
from disent_models import CLASSES, TinyCNN, batches, planted

from captum_m2ib.disent import EPIC, InfoDisent


@pytest.fixture(scope="session")
def fitted() -> InfoDisent:
    """InfoDisent on the tiny convolutional net, trained on planted patterns."""
    model = InfoDisent(TinyCNN(), "body", CLASSES, class_names=["bar", "pole", "$slash_1"])
    model.fit(batches(*planted(192)), epochs=40, lr=3e-2)
    return model


@pytest.fixture(scope="session")
def epic() -> EPIC:
    """EPIC on the tiny convolutional net, trained on planted patterns."""
    model = EPIC(TinyCNN(), "body", "fc")
    model.fit(batches(*planted(192)), prototypes=(20, 5), epochs=12, transform_lr=2e-2)
    return model
