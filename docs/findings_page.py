"""Make the page on findings from the codes themselves: python docs/findings_page.py."""

from __future__ import annotations

from pathlib import Path

from lmoe_cli.codes import parts, uses

GROUPS = {
    "Files": parts.FILES,
    "The Hub": parts.HUB,
    "Adapters": parts.ADAPTERS,
    "Recipes": parts.RECIPES,
    "Bases": parts.BASES,
    "Do the parts fit?": parts.FIT,
    "Running": uses.RUN,
    "Routers": uses.ROUTERS,
    "Data": uses.DATA,
    "Training": uses.TRAIN,
    "Evaluating": uses.EVALUATE,
    "Baking": uses.BAKE,
    "Comparing": uses.SIMILARITY,
    "Use": uses.USE,
}
OPENING = """# Findings

Every error, warning and note has a code that stays the same between versions. With `--json` it stands under
`findings`, together with severity, place, message and hint. An *error* stops a command, a *warning* asks to be
looked at, a *note* only tells.

This page is made from the code: `python docs/findings_page.py`.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [OPENING]
    for title, group in GROUPS.items():
        parts.append(f"\n## {title}\n\n| code | severity | meaning | what to do |\n| --- | --- | --- | --- |\n")
        for name, code in group.items():
            cells = (f"`{name}`", code.severity, code.meaning, code.remedy)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("findings.md").write_text(page())
