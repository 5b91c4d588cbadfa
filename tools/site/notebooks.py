"""A notebook as a page of the site: its text, its code, and what it printed and showed when it was last run."""

import base64
import re
from typing import Any

Notebook = dict[str, Any]


def as_page(notebook: Notebook, name: str) -> tuple[str, dict[str, bytes]]:
    """Markdown, and the pictures that it shows, by file name.

    Args:
        notebook: as its JSON has it.
        name: the file's, without its ending; pictures are called NAME-1.png and so on.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    heading = name
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ (.+)$", source, flags=re.MULTILINE) or [heading])[-1]
            parts.append(source)
            continue
        parts.append(_command(source) if source.startswith("!") else _block("python", source))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                file = f"{name}-{len(pictures) + 1}.png"
                pictures[file] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{heading}]({file})")
            elif printed := "".join(output.get("text") or data.get("text/plain", "")).rstrip():
                parts.append(_block("text", printed))
    title, _, rest = parts[0].partition("\n")
    note = f"*A [notebook]({name}.ipynb) that tests run; every picture and number below is from its last run.*"
    return "\n\n".join([title, note, rest.strip(), *parts[1:]]) + "\n", pictures


def _command(source: str) -> str:
    """Lines that begin with ! or go on from such, as a shell has them."""
    return _block("sh", re.sub(r"^!", "", source, flags=re.MULTILINE))


def _block(language: str, content: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
    return f"{fence}{language}\n{content}\n{fence}"
