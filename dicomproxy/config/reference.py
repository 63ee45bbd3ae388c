"""The table of all keys, and the files that are made from the model.

``python -m dicomproxy.config.reference`` in the source tree writes the tables
in docs/configuration.md anew, and config/dicomproxy.schema.json; tests hold
both in step with the model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from dicomproxy.config.keys import Key, walk
from dicomproxy.config.loader import json_schema_text

BEGIN: Final = "<!-- keys: made from the model -->"
END: Final = "<!-- end of keys -->"

_MADE: Final = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)


def tables() -> str:
    """Return, as Markdown, one table for each section of the file."""
    keys = list(walk())
    lines: list[str] = []
    for section in keys:
        if section.section is None:
            continue
        required = " Required." if section.required else ""
        lines += [
            f"### `{section.path}`",
            "",
            f"{section.description}.{required}",
            "",
            "| Key | Expects | Default | Meaning |",
            "|---|---|---|---|",
        ]
        for key in keys:
            if key.section is None and key.path == f"{section.path}.{key.name}":
                cells = (f"`{key.name}`", key.expected, _default(key), key.description)
                lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """Return *page* with its tables made anew.

    Raises:
        ValueError: the page does not say where they go.
    """
    if not _MADE.search(page):
        raise ValueError(f"no {BEGIN} ... {END}")
    return _MADE.sub(lambda _: f"{BEGIN}\n\n{tables()}\n{END}", page)


def _default(key: Key) -> str:
    if key.required:
        return "required"
    return "" if key.default is None else f"`{key.default}`"


def main() -> None:
    """Write both files, from the root of the source tree."""
    page = Path("docs/configuration.md")
    page.write_text(with_tables(page.read_text("utf-8")), "utf-8")
    Path("config/dicomproxy.schema.json").write_text(json_schema_text(), "utf-8")


if __name__ == "__main__":
    main()
