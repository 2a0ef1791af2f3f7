"""Lines → Markdown, anywhere: needs nothing that was there when they were measured."""

from __future__ import annotations

import re

from benchmarks.gpu.plan import SETTINGS

CELL = re.compile(r"(?P<who>.+)/(?P<n>\d+)/(?P<vocab>\d+)/(?P<setting>no grad|frozen|trainable)")


def tables(lines: list[dict]) -> str:
    """One part for each card; of a figure the newest line counts."""
    cards = list(dict.fromkeys(line["on"] for line in lines if "on" in line))
    return "\n".join(of_one_card(card, [line for line in lines if line.get("on") == card]) for card in cards)


def of_one_card(card: str, lines: list[dict]) -> str:
    figures = {line["key"]: line for line in lines if "key" in line}
    runs = [line for line in lines if "started" in line]
    parts = [
        f"# {card}",
        "",
        *map(of_run, runs),
        *of_card(figures),
        "",
        of_ceilings(figures),
        of_tests(figures.get("tests")),
    ]
    parts += [of_cells(figures, vocab, setting) for vocab in vocabs(figures) for setting in SETTINGS]
    parts += [of_stack(figures)]
    return "\n".join(part for part in parts if part is not None)


def of_run(run: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version != "not installed")
    return f"- run {run['run']}, {run['started']}, commit {run['commit']}, kernels {run['kernels']}: {versions}"


def of_card(figures: dict) -> list[str]:
    """The range of what the card said of itself."""
    states = [line["card"] for line in figures.values() if "sm_mhz" in line.get("card", {})]
    if not states:
        return []
    ranges = [f"{name} {min(s[name] for s in states)} – {max(s[name] for s in states)}" for name in states[0]]
    return [f"- after each figure: {', '.join(ranges)}"]


def of_ceilings(figures: dict) -> str:
    rows = []
    for key, line in figures.items():
        if key.startswith("ceiling/"):
            name = key.removeprefix("ceiling/")
            rows.append((name, rate(line), rate(figures.get(f"ceiling again/{name}"))))
    return table("Ceilings", ("", "at the start", "at the end"), rows)


def rate(line: dict | None) -> str:
    if line is None:
        return "not measured"
    if "ms" not in line:
        return line.get("failed", "to be measured again")
    what = f"{line['tflops']:.0f} TFLOP/s" if "tflops" in line else f"{line['tbs']:.2f} TB/s"
    return f"{what}, {spread(line)}"


def spread(line: dict) -> str:
    return f"{line['ms']:.2f} ms ({line['ms_p10']:.2f} – {line['ms_p90']:.2f}, {line['runs']} runs)"


def of_tests(line: dict | None) -> str:
    if line is None or "passed" not in line:
        return f"## Kernel tests\n\n{'not run' if line is None else line.get('failed', 'to be run again')}\n"
    text = [
        f"## Kernel tests\n\n{line['passed']} passed, {len(line['failures'])} failed, {len(line['skipped'])} skipped"
    ]
    text += [f"\n- failed: {name}\n\n```\n{why}\n```" for name, why in line["failures"].items()]
    text += [f"- skipped: {name}: {why}" for name, why in line["skipped"].items()]
    text += [f"- {name}: {found}" for name, found in line["measured"].items()]
    return "\n".join(text) + "\n"


def vocabs(figures: dict) -> list[int]:
    found = [int(match["vocab"]) for key in figures if (match := CELL.fullmatch(key))]
    return sorted(set(found), reverse=True)


def of_cells(figures: dict, vocab: int, setting: str) -> str | None:
    """Providers × N, each with its ratio to the products at the rate this run measured for them."""
    best = max((line.get("tflops", 0.0) for key, line in figures.items() if f" {vocab}, bf16" in key), default=0.0)
    cells, hidden = {}, hidden_size(figures)
    for key, line in figures.items():
        match = CELL.fullmatch(key)
        if match and int(match["vocab"]) == vocab and match["setting"] == setting:
            n = int(match["n"])
            floor = SETTINGS[setting] * 2 * n * hidden * vocab / best / 1e9 if best and hidden else None
            cells.setdefault(match["who"].removeprefix("peer/"), {})[n] = cell(line, floor)
            if floor:
                cells.setdefault("floor: the products alone", {})[n] = f"{floor:.2f} ms"
    if not cells:
        return None
    columns = sorted({n for row in cells.values() for n in row})
    rows = [(who, *(row.get(n, "") for n in columns)) for who, row in sorted(cells.items())]
    return table(f"V = {vocab:,}, {setting}", ("", *(f"N = {n:,}" for n in columns)), rows)


def hidden_size(figures: dict) -> int | None:
    found = [re.fullmatch(r"ceiling/logits \d+ × (\d+) × \d+, \w+", key) for key in figures]
    return next((int(match[1]) for match in found if match), None)


def cell(line: dict, floor_ms: float | None) -> str:
    if "ms" not in line:
        return line.get("failed", "to be measured again")
    parts = [spread(line)]
    if floor_ms:
        parts.append(f"{line['ms'] / floor_ms:.2f}×")
    if line["gib"] is not None:
        parts.append(f"{line['gib']:.2f} GiB")
    for name, key in (("logp", "logp_error"), ("dX", "dx_error")):
        if line[key] is not None:
            parts.append(f"{name} {line[key]:.0e}")
    return ", ".join(parts) + ("" if line["per_token"] else " (reduced loss only)")


def of_stack(figures: dict) -> str:
    rows = [(key, told_of_stack(figures.get(key, {"failed": "not run"}))) for key in ("stack/resume", "stack/step")]
    return table("The whole stack, bf16, stand-ins in Transformer Engine's place", ("", ""), rows)


def told_of_stack(line: dict) -> str:
    if "failed" in line:
        return line["failed"]
    hidden = ("key", "on", "run", "card", "versions", "ways")
    parts = [f"{name.replace('_', ' ')} {value}" for name, value in line.items() if name not in hidden]
    for mode, way in line.get("ways", {}).items():
        peak = "" if way["peak_gib"] is None else f", peak {way['peak_gib']:.2f} GiB"
        parts.append(f"{mode}: {way['step_ms']:.0f} ms, {way['ratio_to_dpo'][1]:.2f} of DPO{peak}")
    return "; ".join(parts)


def table(title: str, head: tuple, rows: list[tuple]) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(str(part).replace("|", "\\|") for part in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
