"""`overspill probe`: measure this machine once, keep the figures, show them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from overspill.cli.failures import failures_as_exit_codes
from overspill.cli.finetune import parse_place

if TYPE_CHECKING:
    import torch

    from overspill.spec.machine_file import MachineFile


def probe(
    ssd_dir: Annotated[
        list[Path] | None,
        typer.Option(
            parser=parse_place, metavar="PATH", help="Folder on the drive of the SSD tier; repeatable. Without it no drive is measured."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(parser=parse_place, metavar="FILE", help="Write there instead of the cache; for --machine.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    host_budget: Annotated[str | None, typer.Option(help="Host memory to count on, whatever is found; such as 48GiB.")] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Measure although the cache has this machine's figures.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the file itself, nothing else.")] = False,
    debug: Annotated[bool, typer.Option("--debug/--no-debug", help="Print the traceback of an error.")] = False,
) -> None:
    """Measure how much this machine holds and how fast its links, memory, drive and device are; below 30 s.

    Nothing stays on the drive. The figures are kept in the cache, and predictions use them from then on.

    Exit codes: 0 done, 2 wrong input, 3 a file could not be written, 130 interrupted.
    """
    errors = Console(stderr=True)
    with failures_as_exit_codes(errors, debug=debug):
        from overspill.runtime.machine import resolve_device  # torch loads here, so that --help is quick
        from overspill.units import parse_bytes

        budget = None if host_budget is None else parse_bytes(host_budget)
        if budget == 0:
            raise ValueError("--host-budget 0 leaves nothing to measure with; give what a run may use, or leave it out")
        file, is_cached = _find_or_measure(resolve_device(device), list(map(str, ssd_dir or ())), budget, renew, errors)
        _show(file, is_cached, Console(), as_json=json)
        _keep(file, is_cached, out, errors)
        if not json:
            from overspill.report.machine import describe_bound

            Console().print(describe_bound(file), soft_wrap=True, highlight=False, markup=False)


def _find_or_measure(
    device: torch.device, places: list[str], host_budget_bytes: int | None, renew: bool, errors: Console
) -> tuple[MachineFile, bool]:
    """The figures, and whether they are the cache's."""
    from overspill.probe.machine import existing_places, probe_machine

    existing_places(places)  # a place that cannot be meant is no less wrong when the cache has the figures
    cached = None if renew else _cached(device, places, host_budget_bytes, errors)
    if cached is not None:
        return cached, True
    if device.type != "cuda":
        errors.print("· no GPU is used: link and compute are those of the cpu device", highlight=False, markup=False)
    with errors.status("measuring") as status:
        file = probe_machine(device, places, host_budget_bytes=host_budget_bytes, progress=lambda what: status.update(f"measuring {what}"))
    return file, False


def _cached(device: torch.device, places: list[str], host_budget_bytes: int | None, errors: Console) -> MachineFile | None:
    """This machine's file if it holds for what is asked; why it does not is said."""
    from overspill.errors import OverspillError
    from overspill.probe.cache import cache_path, read_machine_file, staleness
    from overspill.probe.identity import read_identity

    here = read_identity(device, places)
    try:
        path = cache_path(here)
        if not path.exists():
            return None
        file = read_machine_file(path)
    except (ValueError, OSError, OverspillError) as error:
        _warn(errors, f"{error}: measuring anew")
        return None
    reason = staleness(file, here)
    if not reason and here.ssd and here.ssd != file.identity.ssd:
        reason = f"its drives are {', '.join(file.identity.ssd) or 'none'}, now asked for are {', '.join(here.ssd)}"
    if not reason and host_budget_bytes is not None and host_budget_bytes != file.capacities.host_budget_bytes:
        reason = "another --host-budget is given"
    if reason:
        _warn(errors, f"{path} is measured anew: {reason}")
        return None
    return file


def _show(file: MachineFile, is_cached: bool, console: Console, *, as_json: bool) -> None:
    if as_json:
        print(file.to_json())
        return
    from overspill.report.machine import machine_table
    from overspill.units import format_bytes, format_seconds

    console.print(machine_table(file))
    for note in file.notes:
        console.print(f"· {note}", soft_wrap=True, highlight=False, markup=False)
    text = f"measured {file.measured_at} in {format_seconds(file.took_s)}"
    if file.ssd_written_bytes:
        text += f"; {format_bytes(file.ssd_written_bytes)} were written to the drive, and nothing of it is left"
    console.print(text + ("; from the cache, --renew measures again" if is_cached else ""), soft_wrap=True, highlight=False, markup=False)


def _keep(file: MachineFile, is_cached: bool, out: Path | None, errors: Console) -> None:
    """Into the cache, or where the user wants it; only the user's own place must be writable."""
    from overspill.errors import StorageError
    from overspill.probe.cache import cache_path, write_machine_file

    if out is not None:
        write_machine_file(out, file)
        errors.print(f"written to {out}", soft_wrap=True, highlight=False, markup=False)
    elif not is_cached:
        try:
            path = cache_path(file.identity)
            write_machine_file(path, file)
            errors.print(f"kept in {path}", soft_wrap=True, highlight=False, markup=False)
        except StorageError as error:
            _warn(errors, f"the figures are not kept: {error}")


def _warn(errors: Console, text: str) -> None:
    errors.print(f"warning: {text}", style="yellow", soft_wrap=True, highlight=False, markup=False)
