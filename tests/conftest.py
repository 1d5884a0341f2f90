"""Test helpers are modules beside the tests; this makes them importable by name.

A test with the marker `clock` claims something of measured time. Other programs may take the machine away in any one measurement, so such
a test is tried up to three times; what its code gets wrong, it gets wrong three times. Nothing else is tried again.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for folder in (".", "runtime", "probe", "architectures", "durability", "overlap", "optim", "scheduling", "workload", "activations"):
    sys.path.insert(0, str(Path(__file__).parent / folder))


CLOCK_RERUNS = 2


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports make hundreds of thousands of objects, none of which is garbage: the collector rests meanwhile."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("rerunfailures"):  # without it, every test is tried once
        for item in items:
            if item.get_closest_marker("clock") is not None:
                item.add_marker(pytest.mark.flaky(reruns=CLOCK_RERUNS, reruns_delay=1))


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


@pytest.fixture(autouse=True, scope="session")
def traced_once() -> Iterator[None]:
    """What the same configuration costs at the same sizes is traced for the first session that predicts from it, and not for each: a third
    of a second, and `tests/workload` holds traces to what runs."""
    from overspill.runtime import predictions  # which takes seconds: not in the process that only hands out tests

    describe, known = predictions.describe_workload, dict[tuple[object, ...], Any]()

    def described(config: Any, **sizes: Any) -> Any:
        key = (type(config), config.to_json_string(use_diff=False), *sorted(sizes.items()))
        if key not in known:
            known[key] = describe(config, **sizes)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "describe_workload", described)
        yield


@pytest.fixture(autouse=True, scope="module")
def settled_objects() -> None:
    """What lives before a module's first test is left out of all later collections, which else take 0.2 s each: half a million objects of
    torch, transformers and the tests' own code. What tests make is collected as ever."""
    gc.collect()
    gc.freeze()
