"""Descriptions for a GPU are the same on every machine, but where a test is about the GPU that is there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def kernels_on_paper(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch is not asked which kernel it takes."""
    from overspill.huggingface import device_kernels

    with pytest.MonkeyPatch.context() as patch:
        if "gpu" not in request.module.__name__:
            patch.setattr(device_kernels, "can_ask_device", lambda: False)
        yield
