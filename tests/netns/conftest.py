from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.faults.harness import Swarm
from tests.netns.net import Net


@pytest.fixture
def net() -> Iterator[Net]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    missing = [tool for tool in ("ip", "iptables", "tc") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"network namespaces need {', '.join(missing)} (apt: iproute2, iptables)")
    made = Net()
    try:
        made.open()
        yield made
    finally:
        made.close()


@pytest.fixture
def swarm(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    made = Swarm(tmp_path_factory.mktemp("n"))  # ends before the namespaces do
    yield made
    made.close()
