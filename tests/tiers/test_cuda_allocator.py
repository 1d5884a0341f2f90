"""torch's allocator is asked to extend what it has, unless the user chose otherwise."""

from __future__ import annotations

import pytest
import torch

from overspill.tiers.cuda import ALLOCATOR_VARIABLES, let_segments_grow


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator was told."""
    told: list[str] = []
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: told[-1] if told else "", raising=False)
    return told


def test_segments_grow_where_nothing_was_chosen(asked: list[str]) -> None:
    assert let_segments_grow()
    assert asked == ["expandable_segments:True"]
    assert not let_segments_grow(), "once is enough"


@pytest.mark.parametrize("has_getter", [True, False])
def test_other_settings_are_told_again_or_torch_would_forget_them(
    has_getter: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch takes what it is told for all: `max_split_size_mb` and others that are not in it go back to their defaults."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512,")
    get = (lambda: "max_split_size_mb:512,") if has_getter else None
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", get, raising=False)
    assert let_segments_grow()
    assert asked == ["max_split_size_mb:512,expandable_segments:True"]


def test_what_was_chosen_in_code_stays(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: "expandable_segments:False", raising=False)
    assert not let_segments_grow()
    assert not asked


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
@pytest.mark.parametrize("value", ["expandable_segments:False", "max_split_size_mb:512,expandable_segments:True"])
def test_the_users_choice_stays(name: str, value: str, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert not let_segments_grow()
    assert not asked


def test_another_allocator_is_left_alone(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert not let_segments_grow()
    assert not asked


def test_an_older_torch_is_asked_by_its_own_name(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", None, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", None, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", asked.append)
    assert let_segments_grow()
    assert asked == ["expandable_segments:True"]


@pytest.mark.gpu
def test_a_gpus_new_segments_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    torch.cuda.empty_cache()
    assert let_segments_grow()
    kept = [torch.empty(size << 20, dtype=torch.uint8, device="cuda") for size in (30, 300)]
    segments = [item for item in torch.cuda.memory_snapshot() if item["allocated_size"] >= 30 << 20]
    assert segments and all(item["is_expandable"] for item in segments)
    assert torch.cuda.memory_reserved() >= sum(item.nbytes for item in kept)
