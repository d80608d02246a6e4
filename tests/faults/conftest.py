from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.harness import Swarm


@pytest.fixture
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    made = Swarm(tmp_path_factory.mktemp("f"))
    yield made
    made.close()
