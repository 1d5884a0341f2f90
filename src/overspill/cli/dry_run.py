"""`overspill finetune --dry-run`: whether a run would fit, where everything would rest, and how long a step would take.

Nothing big is opened: the model is its config, the data is not looked at (samples are taken to be `--seq-len` long), nothing is allocated
or written. Where a machine file holds here, one block of every class is timed on the device, in about five seconds; without one, times
rest on assumed rates, and no time is told.

It does not fit where no plan keeps the budgets, and where a plan does and the predicted peak of the device or of host memory exceeds what
is free or allowed all the same. Both are errors with both numbers.
"""

from __future__ import annotations

from rich.console import Console

from overspill.cli.finetune import FinetuneOptions
from overspill.cli.optimizer_flags import build_optimizer
from overspill.cli.training_run import build_request, resolve_dtype, validate_options
from overspill.errors import BudgetError
from overspill.huggingface.weights import open_config
from overspill.huggingface.workload import build_streamed
from overspill.report.lifetime import describe_forecast, describe_wear
from overspill.report.prediction import prediction_table
from overspill.report.tables import placement_table
from overspill.runtime.machine import find_hardware, resolve_device
from overspill.runtime.opening import describe_batch, make_plan, plan_for_optimizer, refuse_compiled
from overspill.runtime.predictions import Predictions
from overspill.runtime.programs import Programs
from overspill.spec.hardware import HardwareSpec
from overspill.spec.lifetime import build_wear, forecast_wear
from overspill.spec.plan import Plan, PlanRequest
from overspill.spec.report import Prediction
from overspill.tiers.wear import drive_shares
from overspill.units import format_bytes, format_seconds, parse_bytes


def run_dry(options: FinetuneOptions, console: Console) -> None:
    """Print plan and prediction.

    Raises:
        ValueError: wrong input.
        BudgetError: it does not fit; with the missing bytes and the flag.
    """
    validate_options(options)
    config = open_config(options.model)
    model = build_streamed(config, resolve_dtype(options))
    request = plan_for_optimizer(build_request(options, options.seq_len), build_optimizer(options))
    request = refuse_compiled(request) if options.compile else request
    assert isinstance(request, PlanRequest)
    device = resolve_device(request.device)
    hardware = find_hardware(request, device, options.machine)
    workload = describe_batch(request, config, device)
    plan = make_plan(request, model, hardware, device=str(device), chunk_bytes=None, workload=workload, replays_graphs=options.cuda_graphs)
    console.print(placement_table(plan.table()))
    for note in plan.notes:
        console.print(f"· {note}", highlight=False)
    predictions = Predictions(
        plan, config, Programs(plan), hardware, replays_graphs=options.cuda_graphs, serial=options.serial, workload=workload
    )
    if hardware.is_measured:
        predictions.time_templates(device)
    prediction = predictions.predict_whole_step()
    console.print(prediction_table(prediction))
    for line in describe_prediction(prediction, plan):
        console.print(line, soft_wrap=True, highlight=False)
    require_fit(prediction, options, hardware)
    console.print("it fits", highlight=False)


def describe_prediction(prediction: Prediction, plan: Plan) -> list[str]:
    """What a step does to time and drive."""
    lines = []
    if prediction.has_times:
        exposed = {lane: seconds for lane, seconds in prediction.exposed_s.items() if seconds}
        longest = max(exposed, key=lambda lane: exposed[lane], default=None)
        rate = plan.accumulate * plan.micro_batch * plan.seq_len / prediction.step_s
        lines.append(f"a step: {format_seconds(prediction.step_s)}, {rate:.0f} tokens/s; {prediction.source}")
        bound = f"; it waits longest for {longest}, {format_seconds(exposed[longest])}" if longest is not None else ""
        lines.append(f"compute is busy for {format_seconds(prediction.lane_busy_s['compute'])} of it{bound}")
    else:
        lines.append(f"a step: no time is told, because rates are {prediction.source}; measure them with `overspill probe`")
    if plan.ssd_places:
        lines.append(f"SSD: {format_bytes(prediction.ssd_read_bytes)} read and {format_bytes(prediction.ssd_written_bytes)} written a step")
        if prediction.has_times:
            share = max(share for _, share in drive_shares(plan.ssd_places))
            wear = build_wear(own_bytes=0, rated_bytes=plan.ssd_rated_bytes, health=None, share_fraction=share)
            forecast = forecast_wear(wear, bytes_per_step=prediction.ssd_written_bytes, step_s=prediction.step_s)
            lines.append(f"SSD: {describe_forecast(forecast)}; {describe_wear(wear)}")
    return lines


def require_fit(prediction: Prediction, options: FinetuneOptions, hardware: HardwareSpec) -> None:
    """Refuse a peak beyond what may be used.

    Raises:
        BudgetError: with both numbers and the flag.
    """
    peaks = {
        "device": (prediction.device_peak_bytes, options.device_budget, hardware.device_capacity_bytes),
        "host": (prediction.host_peak_bytes, options.host_budget, hardware.host_capacity_bytes + hardware.process_bytes),
    }
    for tier, (peak, budget, capacity) in peaks.items():
        allowed = parse_bytes(budget) if budget is not None else capacity
        known = budget is not None or (hardware.host_capacity_bytes if tier == "host" else capacity)
        if known and peak > allowed:
            cure = f"raise --{tier}-budget" if budget is not None else f"give a --{tier}-budget below it"
            raise BudgetError(
                f"it does not fit: the {tier} peak is predicted at {format_bytes(peak)}, {format_bytes(allowed)} may be used, "
                f"{format_bytes(peak - allowed)} are missing; {cure}, or lower --micro-batch or --seq-len"
            )
