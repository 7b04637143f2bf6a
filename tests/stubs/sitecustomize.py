"""Python imports this at its start: child processes get what the tests have."""

import torchvision_operators  # noqa: F401
