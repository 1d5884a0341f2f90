"""Claims about the floor of a step: each formula, with numbers by hand."""

from __future__ import annotations

import pytest

from overspill.planning.floor import build_step_work
from overspill.spec.documents import to_json
from overspill.spec.rates import Floor, LaneRates, LinkRates
from overspill.spec.schedule import (
    Compute,
    Evict,
    Fetch,
    Lane,
    Op,
    Phase,
    Piece,
    Role,
    Schedule,
    ScheduledOp,
    Update,
)
from overspill.spec.tensors import Tier

INDEPENDENT = LinkRates(up_bytes_per_s=10, down_bytes_per_s=5, up_duplex_bytes_per_s=10, down_duplex_bytes_per_s=5)
SHARED = LinkRates(up_bytes_per_s=10, down_bytes_per_s=10, up_duplex_bytes_per_s=5, down_duplex_bytes_per_s=5)
RATES = LaneRates(link=INDEPENDENT, ssd=SHARED, update_parameters_per_s=4)
PIECE = Piece(role=Role.PARAMETER, owner="block", index=0)


def fetch(size: int, *, ssd: bool = False) -> Op:
    return Fetch(piece=PIECE, source=Tier.SSD if ssd else Tier.HOST, target=Tier.HOST if ssd else Tier.DEVICE, num_bytes=size)


def evict(size: int, *, ssd: bool = False) -> Op:
    return Evict(piece=PIECE, source=Tier.HOST if ssd else Tier.DEVICE, target=Tier.SSD if ssd else Tier.HOST, num_bytes=size)


def update(elements: int) -> Op:
    return Update(bundle="block", chunk=0, tier=Tier.HOST, num_elements=elements, num_bytes=0)


def compute(phase: Phase) -> Op:
    return Compute(unit="block", micro_batch=0, phase=phase, produced=(), flops=0.0)


def schedule(*ops: tuple[Op, Lane, tuple[int, ...]]) -> Schedule:
    return Schedule(
        name="train",
        ops=tuple(ScheduledOp(op=op, lane=lane, waits=waits) for op, lane, waits in ops),
        num_micro_batches=1,
        groups=((0,),),
        starts_pending=False,
        ends_pending=False,
    )


def test_directions_that_do_not_disturb_each_other_need_the_longer_one() -> None:
    assert INDEPENDENT.work_s(100, 10) == 10
    assert INDEPENDENT.work_s(10, 100) == 20


def test_directions_that_share_one_rate_need_the_sum() -> None:
    assert SHARED.work_s(100, 10) == SHARED.work_s(10, 100) == 11


def test_directions_that_disturb_each_other_a_little_need_more_than_the_longer_and_less_than_the_sum() -> None:
    """Alone 10 each, 8 each together. 80 up, 80 down: 10 s. 80 up, 40 down: 5 s both at 8, and the 40 left alone at 10: 9 s."""
    link = LinkRates(up_bytes_per_s=10, down_bytes_per_s=10, up_duplex_bytes_per_s=8, down_duplex_bytes_per_s=8)
    assert link.work_s(80, 80) == pytest.approx(10)
    assert link.work_s(80, 40) == pytest.approx(9)


def test_directions_slower_together_than_in_turns_are_taken_in_turns() -> None:
    link = LinkRates(up_bytes_per_s=10, down_bytes_per_s=10, up_duplex_bytes_per_s=2, down_duplex_bytes_per_s=2)
    assert link.work_s(50, 50) == 10


def test_without_clip_the_floor_is_the_longest_lane() -> None:
    work = build_step_work(
        schedule(
            (fetch(300), Lane.H2D, ()),  # 30 s at 10
            (compute(Phase.FORWARD), Lane.COMPUTE, (0,)),
            (compute(Phase.BACKWARD), Lane.COMPUTE, (1,)),
            (fetch(100, ssd=True), Lane.SSD_READ, ()),  # 10 s, and with the write 15
            (update(8), Lane.HOST_UPDATE, (3,)),  # 2 s at 4
            (evict(50, ssd=True), Lane.SSD_WRITE, (4,)),
        ),
        RATES,
    )
    floor = work.floor(forward_s=3, backward_s=6)
    assert floor.work_s == {"compute": 9, "h2d": 30, "ssd_read": 15, "ssd_write": 15, "host_update": 2}
    assert (floor.floor_s, floor.bound_by, floor.chain_s) == (30, "h2d", 9)


def test_what_depends_on_the_last_compute_comes_behind_it() -> None:
    """The embedding's gradient leaves (40 bytes at 5: 8 s) and is updated (20 at 4: 5 s), side by side; the states were there before."""
    work = build_step_work(
        schedule(
            (compute(Phase.BACKWARD), Lane.COMPUTE, ()),
            (fetch(60, ssd=True), Lane.SSD_READ, ()),
            (evict(40), Lane.D2H, (0,)),
            (update(20), Lane.HOST_UPDATE, (1, 2)),
        ),
        RATES,
    )
    floor = work.floor(forward_s=0, backward_s=7)
    assert work.tail_s == 8 and floor.chain_s == 15
    assert (floor.floor_s, floor.bound_by) == (15, "chain")


def test_with_clip_the_backward_waits_for_the_longer_one_of_forward_and_updates() -> None:
    """T_bwd + max(T_fwd, N / U): 40 parameters at 4 are 10 s; their states, 30 bytes at 10, are 3 s."""
    program = schedule(
        (fetch(30, ssd=True), Lane.SSD_READ, ()),
        (update(40), Lane.HOST_UPDATE, (0,)),
        (compute(Phase.FORWARD), Lane.COMPUTE, (1,)),
        (compute(Phase.BACKWARD), Lane.COMPUTE, (2,)),
    )
    work = build_step_work(program, RATES)
    assert work.floor(forward_s=4, backward_s=6).floor_s == 16
    assert work.floor(forward_s=12, backward_s=6).floor_s == 18
    slow_drive = LaneRates(link=INDEPENDENT, update_parameters_per_s=40, ssd=LinkRates(**dict.fromkeys(vars(SHARED), 2)))
    assert build_step_work(program, slow_drive).floor(forward_s=4, backward_s=6).floor_s == 21


def test_a_lane_without_a_rate_is_named_and_left_out() -> None:
    program = schedule((fetch(30, ssd=True), Lane.SSD_READ, ()), (compute(Phase.FORWARD), Lane.COMPUTE, (0,)))
    work = build_step_work(program, LaneRates(link=None, ssd=None, update_parameters_per_s=None))
    floor = work.floor(forward_s=2, backward_s=0)
    assert floor.unmeasured == ("ssd_read",) and floor.floor_s == 2


def test_a_floor_prints_as_json() -> None:
    assert "chain_s" in to_json(Floor(work_s={"compute": 1.0}, chain_s=2.0))
