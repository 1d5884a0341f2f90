"""Test helpers are modules beside the tests; this makes them importable by name."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for folder in (".", "runtime", "probe", "architectures", "durability", "overlap", "optim", "scheduling", "workload"):
    sys.path.insert(0, str(Path(__file__).parent / folder))


@pytest.fixture(autouse=True, scope="session")
def no_machine_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests predict from assumed rates, whatever `overspill probe` has found on this machine before."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
