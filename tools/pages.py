"""Places on a page that a tool fills: what stands between `<!-- NAME:begin -->` and its end."""

from __future__ import annotations


def fill(text: str, name: str, content: str) -> str:
    """`text` with `content`, between empty lines, in the place of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no place `{name}`")
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"
