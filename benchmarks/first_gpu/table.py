"""Lines → the table that a person reads: what passed, how near to its bound, and what to do about the rest."""

from __future__ import annotations


def table(lines: dict[str, dict], keys: list[str], machine: str) -> str:
    """Markdown; `lines` by key. Every key has a row, also one that was not reached."""
    rows = ["| check | | found | bound | quantity |", "|---|---|---|---|---|"]
    advice = []
    for key in keys:
        line = lines.get(key)
        if line is None:
            rows.append(f"| {key} | not run | | | start the same command again |")
        elif "skipped" in line:
            rows.append(f"| {key} | left out | | | {line['skipped']} |")
        elif "failed" in line:
            rows.append(f"| {key} | **FAILED** | | | {line['failed'].replace('|', '/')} |")
        else:
            word = "ok" if line["ok"] else "**FAILED**"
            rows.append(f"| {key} | {word} | {line['number']:.1e} | {line['bound']:.1e} | {line['quantity']} |")
        if line is not None and not line["ok"]:
            advice += ["", f"**{key}**: {line['means']}. What to do: {line['remedy']}."]
            advice += [
                f"- {name}: {number:.2e}, bound {bound:.2e}" for name, (number, bound) in line.get("all", {}).items()
            ]
    return "\n".join([f"# First minutes on {machine}", "", *rows, *advice]) + "\n"
