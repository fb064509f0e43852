"""The results of the benchmark of CLEAR for people: everything that was measured, or the short table of the README."""

from __future__ import annotations

from typing import Any

__all__ = ["short_table", "table"]

COLUMNS = ("halo", "flex, tiles", "flex, row-major")


def table(result: dict[str, Any]) -> str:
    """All of a result, as a Markdown table and lines after it."""
    lines = [
        f"{_where(result)}; `{result['command']}`, {result['minutes']} minutes",
        "",
        "| | tokens | heads x width | arm | seconds | times faster | extra memory at peak, MiB | rounds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        where = f"{case['what']} | {case['tokens']} | {case['heads']} x {case['head_width']}"
        for arm, row in case["arms"].items():
            peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
            faster = "–" if row["times_faster_than_dense"] is None else f"{row['times_faster_than_dense']:.2f}"
            lines.append(f"| {where} | {arm} | {row['seconds']:.3g} | {faster} | {peak} | {case['rounds']} |")
        lines += [f"| {where} | {arm} | {why} | – | – | – |" for arm, why in case["left_out"].items()]
    lines += [f"{what}: left out, {why}" for what, why in result.get("left_out", {}).items()]
    lines += _flops(result)
    for goal in result.get("goals", []):
        value = "not measured" if goal["value"] is None else f"{goal['value']:.2f}"
        lines.append(f"{goal['goal']}: {value} (goal {goal['at_least']:g}) {'MISSED' if goal['met'] is False else ''}")
    return "\n".join(lines)


def short_table(result: dict[str, Any]) -> str:
    """How many times faster than dense attention, a line for each case: the table of the README."""
    radii = {kind: sorted({r for case in result["cases"] for r in _radii(case, kind)}) for kind in COLUMNS}
    kinds = [kind for kind in COLUMNS if radii[kind]]
    heads = [f"{kind}, r = {' / '.join(map(str, radii[kind]))}" for kind in kinds]
    lines = [
        f"`{result['command']}` on {_where(result)}; times faster than dense fused attention in the same round, medians.",
        "",
        f"| | tokens | heads x width | {' | '.join(heads)} |",
        "|---" * (3 + len(kinds)) + "|",
    ]
    for case in result["cases"]:
        found = {kind: _radii(case, kind) for kind in kinds}
        cells = [" / ".join(found[kind].get(r, "–") for r in radii[kind]) if found[kind] else "" for kind in kinds]
        where = f"{case['what']} | {case['tokens']:,} | {case['heads']} x {case['head_width']}"
        lines.append(f"| {where} | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"{what}: left out, {why}." for what, why in result.get("left_out", {}).items()]
    lines += _flops(result)
    return "\n".join(lines)


def _radii(case: dict[str, Any], kind: str) -> dict[int, str]:
    """Radius -> how many times faster, of one kind of arm."""
    found = {}
    for arm, row in case["arms"].items():
        name, _, radius = arm.rpartition(", r=")
        if name == kind and row["times_faster_than_dense"] is not None:
            found[int(radius)] = f"{row['times_faster_than_dense']:.2g}"
    return found


def _where(result: dict[str, Any]) -> str:
    versions = result["versions"]
    return (
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, torch {versions['torch']}, "
        f"diffusers {versions['diffusers']}"
    )


def _flops(result: dict[str, Any]) -> list[str]:
    lines = []
    for row in result["flops_per_token"]:
        sizes = ", ".join(f"{pixels} px {flops / 1e6:.1f}" for pixels, flops in row["flops_per_token"].items())
        lines.append(f"MFLOP per image token of a FLUX layer, {row['pattern']}: {sizes}")
    return lines
