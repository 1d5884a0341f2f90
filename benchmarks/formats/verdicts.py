"""Are a narrow format's final losses inside fp32's spread over seeds? Curves in, verdicts out; finetune_spread.py says what is judged."""

from __future__ import annotations

import math
import statistics
from typing import Any

SIGMAS = 2.0
"""Chosen: an honest format is found outside once in 20 times."""
EARLY_STEPS = 50


def judge(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each dtype, start of fp32's masters and narrow format that has runs, one verdict."""
    final: dict[tuple[str, str, str], dict[int, float]] = {}
    early: dict[tuple[str, str, str], dict[int, float]] = {}
    for curve in curves:
        group = (curve["dtype"], curve["state_format"], curve["start"])
        if curve["is_complete"]:
            final.setdefault(group, {})[curve["seed"]] = curve["losses"][-1]
        if len(curve["training_losses"]) >= EARLY_STEPS:
            early.setdefault(group, {})[curve["seed"]] = statistics.mean(curve["training_losses"][:EARLY_STEPS])
    verdicts = []
    references = [group for group in early | final if group[1] == "fp32"]
    for dtype, _, start in sorted(set(references)):
        for group in sorted(set(early | final)):
            if group[0] == dtype and group[1] != "fp32":
                reference = (dtype, "fp32", start)
                verdict = {"dtype": dtype, "fp32_start": start, "state_format": group[1]}
                verdict |= paired(early.get(group, {}), early.get(reference, {}), "early")
                verdict |= paired(final.get(group, {}), final.get(reference, {}), "paired")
                verdicts.append(verdict | inside(final.get(group, {}), final.get(reference, {})))
    return verdicts


def paired(losses: dict[int, float], exact: dict[int, float], name: str) -> dict[str, float | None]:
    """Mean over the seeds that both have of (format - fp32), and its standard error."""
    pairs = [losses[seed] - exact[seed] for seed in losses if seed in exact]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return {f"{name}_difference": statistics.mean(pairs) if pairs else None, f"{name}_standard_error": error}


def inside(losses: dict[int, float], exact: dict[int, float]) -> dict[str, Any]:
    """`is_inside` is None where there are too few runs for a verdict."""
    if len(exact) < 3 or not losses:
        return {"num_seeds": len(losses), "fp32_num_seeds": len(exact), "is_inside": None}
    spread = statistics.stdev(exact.values())
    difference = statistics.mean(losses.values()) - statistics.mean(exact.values())
    allowed = SIGMAS * spread * math.sqrt(1 / len(losses) + 1 / len(exact))
    return {
        "num_seeds": len(losses),
        "fp32_num_seeds": len(exact),
        "fp32_mean": statistics.mean(exact.values()),
        "fp32_standard_deviation": spread,
        "mean": statistics.mean(losses.values()),
        "difference": difference,
        "allowed": allowed,
        "is_inside": abs(difference) <= allowed,
    }


def describe(verdict: dict[str, Any]) -> str:
    text = f"{verdict['dtype']}, masters start {verdict['fp32_start']}: {verdict['state_format']} "
    if verdict["is_inside"] is None:
        text += f"not judged ({verdict['num_seeds']} runs, fp32 {verdict['fp32_num_seeds']} of at least 3)"
    else:
        word = "inside" if verdict["is_inside"] else "OUTSIDE"
        text += (
            f"{verdict['mean']:.4f} against fp32's {verdict['fp32_mean']:.4f} (over seeds ±{verdict['fp32_standard_deviation']:.4f}): "
            f"{verdict['difference']:+.4f}, {word} ±{verdict['allowed']:.4f}"
        )
    if verdict["early_difference"] is not None:
        error = f" ± {verdict['early_standard_error']:.4f}" if verdict["early_standard_error"] is not None else ""
        text += f"; first {EARLY_STEPS} steps {verdict['early_difference']:+.4f}{error}"
    return text
