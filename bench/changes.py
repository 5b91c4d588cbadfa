"""What changed between two runs beyond the noise: `make bench-compare A.json B.json`.

A time has changed where its quartiles in both runs lie apart and its median moved by more than a tenth, more than its
group's own move where that has three methods or more: what all of them did is the machine's doing. Ratios of
medians that took turns in one run suffer less from that: the headlines are compared whatever they did.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.render import Record, table

MOVED = 0.10  # of a median, or of memory
HEADLINE_MOVED = 0.15
_SHARED = 3  # methods of a group that tell a busier machine from a change of one of them


def changes(before: Record, after: Record) -> list[str]:
    """Markdown: machines that differ, headlines, times and memory that changed, and what is in one run only."""
    groups = [{group["name"]: group for group in record["groups"]} for record in (before, after)]
    common = [(groups[0][name], groups[1][name]) for name in groups[0] if name in groups[1]]
    lines = ["# What changed", ""]
    for fact in before["machine"].keys() | after["machine"].keys():
        values = [record["machine"].get(fact, "not given") for record in (before, after)]
        if values[0] != values[1]:
            lines.append(f"- {fact}: {values[0]} -> {values[1]}")
    times = [row for one, other in common for row in _times(one, other)]
    memory = [row for one, other in common for row in _memory(one, other)]
    lines += ["", "## Headlines", "", *_headlines(common), "", "## Times beyond the noise", ""]
    header = ("group", "method", "before ms", "after ms", "moved", "the group moved")
    lines += table(header, times) if times else [f"None of {sum(len(one['timings']) for one, _ in common)}."]
    lines += ["", "## Memory", ""]
    header = ("group", "method", "before MB", "after MB", "moved")
    lines += table(header, memory) if memory else ["Nothing moved by more than a tenth."]
    lines += ["", *_missing(*groups), *_missing(*groups[::-1], which="before")]
    return lines


def _headlines(common: list[tuple[Record, Record]]) -> list[str]:
    rows = []
    for one, other in common:
        after = {target["what"]: target for target in other["targets"]}
        for target in one["targets"]:
            if target["headline"] and target["what"] in after:
                values = target["measured"], after[target["what"]]["measured"]
                moved = values[1] / values[0] - 1
                verdict = "**yes**" if abs(moved) > HEADLINE_MOVED else "no"
                shown = (f"{value:.3g} {target['unit']}" for value in values)
                met = [("missed", "met")[found["met"]] for found in (target, after[target["what"]])]
                target_met = met[0] if met[0] == met[1] else f"**{met[0]}, then {met[1]}**"
                rows.append((one["name"], target["what"], *shown, f"{moved:+.1%}", verdict, target_met))
    header = ("group", "", "before", "after", "moved", f"by more than {HEADLINE_MOVED:.0%}", "target")
    return table(header, rows) if rows else ["Neither run has any of the other's."]


def _times(one: Record, other: Record) -> list[tuple[str, ...]]:
    pairs = {name: (time, other["timings"][name]) for name, time in one["timings"].items() if name in other["timings"]}
    if not pairs:
        return []
    moves = {name: after["median"] / before["median"] for name, (before, after) in pairs.items()}
    group = statistics.median(moves.values())
    # What all of a group did is the machine's doing, where enough of it did the same.
    shared = group if len(moves) >= _SHARED else 1.0
    return [
        (one["name"], name, f"{before['median']:.4g}", f"{after['median']:.4g}", _percent(moves[name]), _percent(group))
        for name, (before, after) in pairs.items()
        if (before["high"] < after["low"] or after["high"] < before["low"]) and _far(moves[name] / shared)
    ]


def _memory(one: Record, other: Record) -> list[tuple[str, ...]]:
    pairs = {name: (size, other["memory"][name]) for name, size in one["memory"].items() if name in other["memory"]}
    return [
        (one["name"], name, f"{before / 1e6:,.1f}", f"{after / 1e6:,.1f}", _percent(after / before))
        for name, (before, after) in pairs.items()
        if before > 0 and _far(after / before)
    ]


def _far(ratio: float) -> bool:
    return max(ratio, 1 / max(ratio, 1e-9)) > 1 + MOVED


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.1%}"


def _missing(have: dict[str, Any], lack: dict[str, Any], which: str = "after") -> list[str]:
    rows = []
    for name, group in have.items():
        absent = [method for method in group["timings"] if method not in lack.get(name, {"timings": {}})["timings"]]
        if absent and len(absent) == len(group["timings"]):
            rows.append(f"- Not in the run {which}: {name}")
        else:
            rows += [f"- Not in the run {which}: {name}: {method}" for method in absent]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-compare", description="What changed between two runs.")
    parser.add_argument("before", type=Path, help="a run's JSON file, as in bench/results")
    parser.add_argument("after", type=Path, help="another's")
    options = parser.parse_args()
    records = []
    for path in (options.before, options.after):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError) as error:  # ValueError: no text, or no JSON
            print(f"{path} cannot be read: {error}. Expected a JSON file that `make bench` wrote.", file=sys.stderr)
            return 1
        if not isinstance(record, dict) or not {"machine", "groups"} <= record.keys():
            print(f"{path} is no run of `make bench`: no machine and groups in it.", file=sys.stderr)
            return 1
        records.append(record)
    try:
        lines = changes(records[0], records[1])
    except (KeyError, TypeError, AttributeError) as error:
        print(
            f"{options.before} and {options.after} cannot be compared: {error!r} is missing or of another kind in one. "
            "Expected files that `make bench` of this version wrote; run it anew.",
            file=sys.stderr,
        )
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
