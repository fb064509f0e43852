"""The results of the benchmark of CLEAR for people: everything that was measured, or the short table of the README."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

from .frame import arms_grid, grid, page, where

__all__ = ["short_table", "table"]

COLUMNS = ("halo", "flex, tiles", "flex, row-major")
ABOUT: dict[str, Callable[[dict[str, Any]], Any]] = {  # columns that tell what a case is
    "": itemgetter("what"),
    "tokens": lambda case: format(case["tokens"], ","),
    "heads x width": lambda case: f"{case['heads']} x {case['head_width']}",
}


def table(result: dict[str, Any]) -> str:
    """All of a result, as a Markdown table and lines after it."""
    numbers = {"times faster": ("times_faster_than_dense", ".2f")}
    return page(result, arms_grid(result["cases"], ABOUT, numbers), _flops(result))


def short_table(result: dict[str, Any]) -> str:
    """How many times faster than dense attention, a line for each case: the table of the README."""
    radii = {kind: sorted({r for case in result["cases"] for r in _radii(case, kind)}) for kind in COLUMNS}
    kinds = [kind for kind in COLUMNS if radii[kind]]
    heads = [f"{kind}, r = {' / '.join(map(str, radii[kind]))}" for kind in kinds]
    rows = []
    for case in result["cases"]:
        found = {kind: _radii(case, kind) for kind in kinds}
        cells = [" / ".join(found[kind].get(r, "–") for r in radii[kind]) if found[kind] else "" for kind in kinds]
        rows.append([*(tell(case) for tell in ABOUT.values()), *cells])
    lines = [
        f"`{result['command']}` on {where(result)}; times faster than dense fused attention in the same round, medians.",
        "",
        *grid([*ABOUT, *heads], rows),
        "",
        *(f"{what}: left out, {why}." for what, why in result.get("left_out", {}).items()),
        *_flops(result),
    ]
    return "\n".join(lines)


def _radii(case: dict[str, Any], kind: str) -> dict[int, str]:
    """Radius -> how many times faster, of one kind of arm."""
    found = {}
    for arm, row in case["arms"].items():
        name, _, radius = arm.rpartition(", r=")
        if name == kind and row["times_faster_than_dense"] is not None:
            found[int(radius)] = f"{row['times_faster_than_dense']:.2g}"
    return found


def _flops(result: dict[str, Any]) -> list[str]:
    lines = []
    for row in result["flops_per_token"]:
        sizes = ", ".join(f"{pixels} px {flops / 1e6:.1f}" for pixels, flops in row["flops_per_token"].items())
        lines.append(f"MFLOP per image token of a FLUX layer, {row['pattern']}: {sizes}")
    return lines
