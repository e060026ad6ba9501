from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import rendered


@pytest.fixture(params=rendered.OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[rendered.Object]:
    """Everything that one overlay makes."""
    return rendered.render(request.param)
