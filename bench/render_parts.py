"""What `make gpu-check` found part by part, in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

Part = Mapping[str, Any]


def parts_lines(record: Mapping[str, Any]) -> list[str]:
    """How it ended, a table of the parts, then what failed in each and what else there is to say."""
    parts: Sequence[Part] = record.get("parts", [])
    if not parts:
        return []
    rows = [
        (
            part["title"],
            f"**{part['status']}**" if part["failed"] else part["status"],
            part["summary"].replace("|", "\\|"),
            f"{part['seconds']:.0f}" if part["seconds"] else "",
            f"{part['allowed']:.0f}" if part["allowed"] else "",
        )
        for part in parts
    ]
    header = ("part", "outcome", "what was found", "seconds", "of at most")
    lines = ["## Checks", "", _verdict(record, parts), ""]
    lines += ["| " + " | ".join(row) + " |" for row in (header, tuple("---" for _ in header), *rows)] + [""]
    for part in parts:
        notes = [*filter(None, [part.get("lacks")]), *part["notes"]]
        if part["failures"] or notes:
            lines += [f"### {part['title']}", ""]
            for note in notes:
                lines += [note, ""]
            if part["failures"]:
                shown = [f"- `{test}`: {message}" for test, message in part["failures"].items()]
                lines += [*shown, "", f"The whole is in the log of {part['log']}.", ""]
    return lines


def _verdict(record: Mapping[str, Any], parts: Sequence[Part]) -> str:
    failed = [part["title"] for part in parts if part["failed"]]
    if record["stopped"]:
        begun = f"**Not whole:** {record['stopped']}."
    elif not record["finished"]:
        begun = "**Not whole:** the check is under way, or was killed."
    else:
        begun = f"In {record['minutes']:g} minutes at most."
    if failed:
        return f"{begun} **The check fails by:** {', '.join(failed)}. What these found is to be doubted."
    return f"{begun} Nothing failed." if record["finished"] else begun
