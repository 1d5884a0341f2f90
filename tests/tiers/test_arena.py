"""Slots by plan: they lie where the plan says, come with all work on their bytes, and the books stay true after an interruption."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overspill.errors import BudgetError
from overspill.ranges import LeftWork
from overspill.tiers import Arena, DeviceMemory

PAGE = 4096


class Work:
    """Under way until it is told to end."""

    def __init__(self) -> None:
        self.is_done = False
        self.num_settled = 0

    def settle(self) -> None:
        self.num_settled += 1


def make_arena(budget_bytes: int | None = None) -> tuple[DeviceMemory, Arena]:
    memory = DeviceMemory(torch.device("cpu"), budget_bytes=budget_bytes)
    return memory, Arena(memory, "device")


def test_slots_lie_where_the_plan_says_and_the_same_program_finds_them_there_again() -> None:
    memory, arena = make_arena()
    seen = []
    for _ in range(2):
        assert arena.follow([(0, PAGE), (2 * PAGE, 2 * PAGE), (0, 2 * PAGE)], num_bytes=4 * PAGE)
        one, two = arena.acquire(100), arena.acquire(2 * PAGE)
        assert one.tensor.shape == (100,) and two.tensor.data_ptr() - one.tensor.data_ptr() == 2 * PAGE
        one.release()
        three = arena.acquire(2 * PAGE)
        seen.append((two.tensor.data_ptr(), three.tensor.data_ptr()))
        assert arena.used_bytes == 4 * PAGE
        two.release()
        three.release()
    assert seen[0] == seen[1] and memory.allocated_bytes == 4 * PAGE and arena.used_bytes == 0
    report = arena.report()
    assert (report.peak_bytes, report.num_trimmed, report.most_in_flight) == (4 * PAGE, 0, 2)
    assert report.idle_bytes == 4 * PAGE and report.peak_asked_bytes == 4 * PAGE
    memory.close()


def test_a_slot_comes_with_the_unfinished_work_on_any_of_its_bytes_and_on_no_others() -> None:
    memory, arena = make_arena()
    low, high, far = Work(), Work(), Work()
    arena.follow([(0, PAGE), (PAGE, 2 * PAGE), (3 * PAGE, PAGE), (0, 2 * PAGE), (2 * PAGE, PAGE), (0, PAGE)], num_bytes=4 * PAGE)
    for work, size in ((low, PAGE), (high, 2 * PAGE), (far, PAGE)):
        arena.acquire(size).release([work])
    over_both = arena.acquire(2 * PAGE)
    assert over_both.after == (low, high)
    assert arena.acquire(PAGE).after == (high,), "the rest of what was split is still in use"
    over_both.release()
    assert arena.acquire(PAGE).after == (), "whoever had the bytes since has waited"
    far.is_done = True
    arena.follow([(3 * PAGE, PAGE)], num_bytes=4 * PAGE)
    assert arena.acquire(PAGE).after == ()
    memory.close()


def test_new_memory_comes_with_the_work_of_its_allocation() -> None:
    memory = DeviceMemory(torch.device("cpu"), budget_bytes=None)
    zeroing = Work()
    arena = Arena(memory, "device", fresh_work=lambda: [zeroing])
    arena.follow([(PAGE, PAGE)], num_bytes=2 * PAGE)
    assert arena.acquire(10).after == (zeroing,)
    memory.close()


def test_the_block_grows_when_nothing_in_it_is_lent_and_never_moves_under_a_slot() -> None:
    memory, arena = make_arena()
    arena.follow([(0, PAGE)], num_bytes=PAGE)
    kept = arena.acquire(PAGE)
    work = Work()
    assert not arena.follow([(0, PAGE)], num_bytes=2 * PAGE)
    by_size = arena.acquire(PAGE)
    assert by_size.block_name.startswith("device/slot-") and memory.allocated_bytes == 2 * PAGE
    by_size.release()
    kept.release([work])
    assert arena.follow([(PAGE, PAGE)], num_bytes=2 * PAGE)
    assert work.num_settled == 1, "the old block was freed under work on it"
    assert memory.allocated_bytes == 2 * PAGE, "the slots lent by size make room"
    memory.close()


def test_without_room_in_the_budget_slots_are_lent_by_size() -> None:
    memory, arena = make_arena(budget_bytes=2 * PAGE)
    assert not arena.follow([(0, PAGE), (PAGE, 2 * PAGE)], num_bytes=3 * PAGE)
    arena.acquire(PAGE).release()
    arena.acquire(2 * PAGE).release()
    assert arena.report().num_trimmed == 1 and arena.report().peak_bytes == 2 * PAGE
    memory.close()


def test_a_program_that_leaves_its_plan_is_caught() -> None:
    memory, arena = make_arena()
    arena.follow([(0, PAGE), (0, PAGE)], num_bytes=PAGE)
    arena.acquire(PAGE)
    with pytest.raises(AssertionError, match="are lent"):
        arena.acquire(PAGE)
    arena.follow([(0, PAGE)], num_bytes=PAGE)
    with pytest.raises(AssertionError, match="slot 0 has 4096 B, asked 5000 B"):
        arena.acquire(5000)
    arena.follow([(0, PAGE)], num_bytes=PAGE)
    memory.close()


def test_writing_to_one_slot_is_no_change_of_another_but_giving_back_is_one_of_its_own_tensor() -> None:
    """What autograd's version check needs: else a right graph is refused, or a stale one accepted."""
    memory, arena = make_arena()
    arena.follow([(0, PAGE), (PAGE, PAGE)], num_bytes=2 * PAGE)
    one, two = arena.acquire(PAGE), arena.acquire(PAGE)
    kept, version = one.tensor, one.tensor._version
    two.tensor.zero_()
    assert kept._version == version
    one.release()
    assert kept._version > version
    memory.close()


def test_after_an_interruption_the_books_follow_what_the_borrower_has() -> None:
    memory, arena = make_arena()
    arena.follow([(0, PAGE), (PAGE, PAGE)], num_bytes=2 * PAGE)
    kept, lost = arena.acquire(PAGE), arena.acquire(PAGE)
    memory.allocate("device/arena-99", PAGE)  # an allocation that nobody took
    for _ in range(2):
        arena.recover([kept])
        assert arena.used_bytes == PAGE and memory.allocated_bytes == 2 * PAGE
    assert arena.follow([(PAGE, PAGE)], num_bytes=2 * PAGE)
    arena.acquire(PAGE).release()
    kept.release()
    assert arena.used_bytes == 0 and not lost._is_released
    arena.leave()
    assert arena.trim() == 2 * PAGE and memory.allocated_bytes == 0


def test_trimming_keeps_the_block_while_a_program_runs_in_it() -> None:
    memory, arena = make_arena()
    arena.follow([(0, PAGE)], num_bytes=PAGE)
    assert arena.trim() == 0
    arena.acquire(PAGE).release()
    assert arena.trim() == 0, "the program will borrow more"
    arena.leave()
    assert arena.trim() == PAGE


def test_who_is_in_no_program_borrows_from_the_idle_block_and_beside_it_where_it_is_lent() -> None:
    memory, arena = make_arena()
    work = Work()
    arena.follow([(0, PAGE), (PAGE, 2 * PAGE)], num_bytes=3 * PAGE)
    arena.acquire(PAGE).release([work])
    with arena.borrow(2 * PAGE) as slot:
        assert slot.after == (work,) and memory.allocated_bytes == 3 * PAGE
        assert work.num_settled == 1, "who is in no program waits for nothing afterwards"
    arena.follow([(0, PAGE)], num_bytes=3 * PAGE)
    lent = arena.acquire(PAGE)
    arena.unplanned.limit_bytes = PAGE  # of a program before, which is over
    with arena.borrow(2 * PAGE) as slot:
        assert slot.block_name.startswith("device/slot-") and memory.allocated_bytes == 5 * PAGE
    assert arena.report().peak_bytes == 5 * PAGE and arena.report().peak_asked_bytes == 3 * PAGE
    arena.follow([(PAGE, PAGE)], num_bytes=3 * PAGE)
    assert memory.allocated_bytes == 3 * PAGE, "what was lent by size is not kept beside the arena"
    lent.release()
    memory.close()


def test_a_budget_without_room_beside_the_block_gives_the_block_up_for_what_is_borrowed() -> None:
    memory, arena = make_arena(budget_bytes=4 * PAGE)
    arena.follow([(0, PAGE)], num_bytes=2 * PAGE)
    lent = arena.acquire(PAGE)
    with pytest.raises(BudgetError):
        arena.borrow(3 * PAGE)
    lent.release()
    arena.borrow(3 * PAGE).release()
    assert arena.block_bytes == 0
    assert arena.follow([(0, PAGE)], num_bytes=2 * PAGE) and memory.allocated_bytes == 2 * PAGE
    memory.close()


@pytest.mark.clock
def test_thousands_of_slots_are_lent_in_a_moment() -> None:
    memory, arena = make_arena()
    number = 4000
    arena.follow([(index * PAGE, PAGE) for index in range(number)], num_bytes=number * PAGE)
    begun = time.perf_counter()
    slots = [arena.acquire(PAGE) for _ in range(number)]
    for slot in slots:
        slot.release([Work()])
    assert time.perf_counter() - begun < 2
    assert arena.used_bytes == 0
    memory.close()


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 8)), max_size=60))
def test_work_left_on_ranges_is_found_by_whoever_gets_any_byte_of_them(steps: list[tuple[bool, int, int]]) -> None:
    """Against a list of bytes."""
    book, left, lent = LeftWork[int](), {}, []
    for number, (gives_back, start, size) in enumerate(steps):
        if gives_back and lent:
            low, high = lent.pop(start % len(lent))
            book.leave(low, high, (number,))
            left.update(dict.fromkeys(range(low, high), number))
        elif all(start + size <= low or high <= start for low, high in lent):
            assert sorted(book.take(start, start + size)) == sorted({left.pop(byte) for byte in range(start, start + size) if byte in left})
            lent.append((start, start + size))
    assert set(book) == set(left.values())
