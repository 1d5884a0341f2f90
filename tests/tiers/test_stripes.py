"""Several directories as one store: addresses are dealt out as the engine does it, and a set is opened whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overspill import _native
from overspill.errors import BudgetError, StorageError
from overspill.tiers import SsdStore
from overspill.tiers.extent_file import FILE_NAME
from overspill.tiers.striped_file import NOTE_NAME, relocate
from overspill.tiers.stripes import STRIPE_BYTES, StripeLayout
from overspill.units import MIB


def random_bytes(num_bytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def folders(tmp_path: Path, count: int = 3) -> list[Path]:
    return [tmp_path / f"drive-{index}" for index in range(count)]


def kept(places: list[Path]) -> SsdStore:
    store = SsdStore(places, capacity_bytes=24 * MIB)
    store.allocate("a", 20 * MIB)
    store.start_write("a", 0, random_bytes(20 * MIB)).wait()
    store.flush()
    store.keep()
    return store


@given(num_files=st.integers(1, 5), stripe_pages=st.integers(1, 4), address=st.integers(0, 200_000), num_bytes=st.integers(0, 200_000))
def test_the_ranges_of_the_files_are_those_that_the_engine_moves(num_files: int, stripe_pages: int, address: int, num_bytes: int) -> None:
    layout = StripeLayout(num_files=num_files, stripe_bytes=stripe_pages * 4096)
    engine = _native.IoEngine(
        files=[(-1, 0)] * num_files, stripe_bytes=layout.stripe_bytes, alignment=4096, part_bytes=1 << 20, num_threads=1
    )
    ranges = layout.file_ranges(address, num_bytes)
    assert sum(size for _, _, size in ranges) == num_bytes
    covered = {file: (offset, offset + size) for file, offset, size in ranges}
    for at in (address, address + num_bytes // 2, address + num_bytes - 1):
        if num_bytes:
            file, offset = engine.locate(at)
            assert covered[file][0] <= offset < covered[file][1]
    engine.close()
    room = layout.file_bytes(address + num_bytes)
    assert all(offset + size <= room for _, offset, size in ranges) and room * num_files >= address + num_bytes


def test_capacity_is_split_equally_and_every_file_gets_its_share_of_the_bytes(tmp_path: Path) -> None:
    places = folders(tmp_path)
    with SsdStore(places, capacity_bytes=22 * MIB) as store:
        assert [(place / FILE_NAME).stat().st_size for place in places] == [2 * STRIPE_BYTES] * 3
        assert store.capacity_bytes == 22 * MIB
        store.allocate("a", 21 * MIB)
        data = random_bytes(21 * MIB)
        store.start_trace()
        store.start_write("a", 0, data).wait()
        spans = store.take_trace()
        per_file = [sum(span.num_bytes for span in spans if span.file == file) for file in range(3)]
        assert per_file == [8 * MIB, 8 * MIB, 5 * MIB]
        back = torch.empty_like(data)
        store.start_read("a", 0, back).wait()
        assert torch.equal(back, data)
        second = (places[1] / FILE_NAME).read_bytes()[: 4 * MIB]
        assert second == data[4 * MIB : 8 * MIB].numpy().tobytes()
    assert all(list(place.iterdir()) == [] for place in places)


def test_a_failure_names_the_file_and_the_offset_in_it(tmp_path: Path) -> None:
    places = folders(tmp_path)
    with SsdStore(places, capacity_bytes=24 * MIB) as store:
        store.allocate("a", 24 * MIB)
        with (places[1] / FILE_NAME).open("r+b") as file:
            file.truncate(4 * MIB)
        with pytest.raises(StorageError, match=rf"short read of a: wanted \d+ B at offset {4 * MIB} of {places[1] / FILE_NAME}"):
            store.start_read("a", 0, torch.empty(24 * MIB, dtype=torch.uint8)).wait()


def test_a_place_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="drive-0 is given twice"):
        SsdStore([tmp_path / "drive-0", tmp_path / "x" / ".." / "drive-0"], capacity_bytes=MIB)


def test_a_place_without_room_leaves_no_file_anywhere(tmp_path: Path) -> None:
    places = folders(tmp_path)
    with pytest.raises(BudgetError, match="free; give another --ssd-dir"):
        SsdStore(places, capacity_bytes=1 << 50)
    assert not [path for place in places if place.exists() for path in place.iterdir()]


def test_every_place_is_locked(tmp_path: Path) -> None:
    places = folders(tmp_path)
    with SsdStore(places, capacity_bytes=MIB), pytest.raises(StorageError, match="drive-2.*in use by another run"):
        SsdStore(places[2], capacity_bytes=MIB)


def test_a_kept_set_is_opened_again_also_where_its_drives_were_moved(tmp_path: Path) -> None:
    places = folders(tmp_path)
    store = kept(places)
    stripes, position = store.stripe_set, store.position("a")
    assert stripes is not None and [Path(place) for place in stripes.places] == places
    store.close()
    moved = [place.rename(tmp_path / f"moved-{index}") for index, place in enumerate(places)]
    found = relocate(stripes, [str(place) for place in reversed(moved)])
    assert [Path(place) for place in found.places] == moved
    with SsdStore(found.places, capacity_bytes=24 * MIB, existing=True, stripes=found, read_only=True) as again:
        again.adopt("a", position, 20 * MIB)
        back = torch.empty(20 * MIB, dtype=torch.uint8)
        again.start_read("a", 0, back).wait()
        assert torch.equal(back, random_bytes(20 * MIB))


def test_a_missing_a_strange_and_a_cut_part_of_a_set_are_named(tmp_path: Path) -> None:
    places = folders(tmp_path)
    store = kept(places)
    stripes = store.stripe_set
    assert stripes is not None
    store.close()

    def open_again() -> None:
        SsdStore(places, capacity_bytes=24 * MIB, existing=True, stripes=stripes, kept_bytes=24 * MIB).close()

    open_again()
    hidden = places[2].rename(tmp_path / "hidden")
    with pytest.raises(StorageError, match=rf"drive-2/{FILE_NAME} is missing, which is part 3 of 3 of this checkpoint's data; mount"):
        open_again()
    assert not places[2].exists()
    hidden.rename(places[2])
    note = places[1] / NOTE_NAME
    text = note.read_text()
    note.write_text((places[2] / NOTE_NAME).read_text())
    with pytest.raises(StorageError, match="drive-1 should hold part 2 of 3 .*, but it is part 3 of set"):
        open_again()
    note.unlink()
    with pytest.raises(StorageError, match="drive-1 should hold part 2 of 3 .*, but it has no note that can be read"):
        open_again()
    note.write_text(text)
    with (places[1] / FILE_NAME).open("r+b") as file:
        file.truncate(4 * MIB)
    with pytest.raises(StorageError, match=rf"has {4 * MIB} B, as part 2 of 3 of this checkpoint's data it needs {8 * MIB} B"):
        open_again()


def test_a_new_run_does_not_overwrite_a_part_of_another_set(tmp_path: Path) -> None:
    places = folders(tmp_path)
    kept(places).close()
    with pytest.raises(StorageError, match="drive-1 holds part 2 of 3 of the checkpoints in .*drive-0; give another --ssd-dir, or delete"):
        SsdStore([tmp_path / "new", places[1]], capacity_bytes=16 * MIB)
    with pytest.raises(StorageError, match="drive-1 holds part 2 of 3"):
        SsdStore(places[1], capacity_bytes=16 * MIB)
    assert (places[1] / FILE_NAME).stat().st_size == 8 * MIB
    SsdStore(places, capacity_bytes=16 * MIB).close()  # the same set anew: its manifests, if any, were looked at before
    assert not (places[1] / NOTE_NAME).exists()
