"""The page of `bvpo report` in a real browser, used by the keyboard alone.

One browser and one walk through the page for all tests of this file; the walk never moves or clicks a pointer.
"""

import asyncio
import json

import pytest

from megatron_bvpo.reporting.html_page import write_page
from megatron_bvpo.reporting.run_files import read_runs
from tests.unit.chromium import CHROMIUM, WHY_NOT, Browser
from tests.unit.report_runs import made_run, made_scores

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)

SHEET = 1000  # CSS pixels of a landscape sheet between its margins
NAMES = '[...document.querySelectorAll("#run-table tbody th")].map((cell) => cell.textContent)'
# Title and colours of the lines of every chart that is shown.
LINES = """[...document.querySelectorAll("#charts figure")].filter((figure) => !figure.hidden).map((figure) => [
    figure.querySelector("figcaption").textContent,
    [...figure.querySelectorAll("g > path:not(.point):not(.spike):not(.band)")].map((path) => path.style.stroke),
])"""
READ = 'document.querySelector("#charts figure tbody td").textContent'
SPIKES = 'document.querySelectorAll(".spike").length'
BROKEN = '[...document.querySelectorAll("#charts path")].filter((p) => /NaN|Inf/.test(p.getAttribute("d"))).length'
SORTED = '[document.querySelector("[aria-sort=descending]").textContent, document.getElementById("sorted").textContent]'
# Everything that a keyboard must reach, by what it is.
WANTED = 'document.querySelectorAll("a, button, input, select, summary, [tabindex]").length'
# Marks what has the focus; whether the focus is seen, and whether it is what was looked for.
FOCUSED = """(() => {
    const here = document.activeElement;
    here.dataset.seen = "1";
    return [getComputedStyle(here).outlineStyle !== "none", here.matches(%s), here.outerHTML.slice(0, 100)];
})()"""
SEEN = 'document.querySelectorAll("[data-seen]").length'
SPILLS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """What the walk saw."""
    folder = tmp_path_factory.mktemp("report")
    lr = {"b-run": 9e-6, "a-run": 5e-5, "c-run": 2e-5}  # sorted as texts the first would come last
    for i, (name, rate) in enumerate(lr.items()):
        spikes = (45,) if name == "a-run" else ()
        more = {f"long_name_of_setting_{j:02}": i for j in range(20)}
        run = made_run(folder / name, steps=60, seed=i, settings={"lr": rate, **more}, spikes=spikes)
        if name != "c-run":
            made_scores(run / "eval", {("HLE", "thinking"): 0.15 + i / 50})
    # A run that has just begun, and one by stock DPO.
    made_run(folder / "dpo", steps=60, streams=("trace",))
    (folder / "dpo" / "args.json").unlink()
    page = folder / "runs.html"
    write_page(read_runs([folder / name for name in (*lr, "dpo")]), page)
    return asyncio.run(walk(page, folder / "profile"))


async def walk(page, profile) -> dict:
    found = {}
    async with Browser(profile) as browser:
        for width in (390, 1440):
            await browser.look(width, dark=width == 390)
            await browser.open(page)
            found[f"spills at {width}"] = await browser.run(SPILLS)
            found[f"page colour at {width}"] = await browser.run("getComputedStyle(document.body).backgroundColor")
        await browser.look(SHEET, media="print")
        found["spills in print"] = await browser.run(SPILLS)
        await browser.look(1440)
        found["drawn"] = await browser.run(LINES)
        found["spikes"], found["broken"] = await browser.run(SPIKES), await browser.run(BROKEN)

        async def tab_to(selector: str) -> None:
            for _ in range(200):
                await browser.press("Tab", 9)
                visible, reached, element = await browser.run(FOCUSED % json.dumps(selector))
                if not visible:
                    found.setdefault("focus not seen", []).append(element)
                if reached:
                    return await browser.settled()
            raise AssertionError(f"no way to {selector} by the tabulator")

        async def enter() -> None:
            await browser.press("Enter", 13, "\r")
            await browser.settled()

        async def space() -> None:
            await browser.press(" ", 32, " ")
            await browser.settled()

        orders = found["orders"] = {"given": await browser.run(NAMES)}
        await tab_to("#run-table th:nth-child(1) button")
        await enter()
        orders["run up"] = await browser.run(NAMES)
        await tab_to("#run-table th:nth-child(2) button")
        await enter()
        orders["score up"] = await browser.run(NAMES)
        await space()
        orders["score down"] = await browser.run(NAMES)
        found["sorted"] = await browser.run(SORTED)
        await tab_to("#run-table th:nth-child(6) button")
        await enter()
        orders["lr up"] = await browser.run(NAMES)

        await tab_to('input[name=run][value="0"]')
        found["stressed"] = await browser.run('document.querySelectorAll(".strong").length')
        await space()
        found["without the first"] = await browser.run(LINES)
        await tab_to("#all-runs")
        await enter()
        found["all"] = await browser.run(LINES)
        await tab_to("#no-runs")
        await enter()
        found["none"] = await browser.run(LINES)
        await browser.press("Tab", 9, shift=True)
        await enter()
        await tab_to('input[name=stream][value="empty"]')
        await space()
        found["trace alone"] = await browser.run(LINES)
        await space()
        await tab_to('input[name=kind][value="t"]')
        await space()
        found["held out alone"] = await browser.run(LINES)
        await space()
        await tab_to("#to")
        for key in ("Backspace", "Backspace"):
            await browser.press(key, 8)
        await browser.press("0", 48, "0")
        await enter()
        found["wrong range"] = await browser.run('document.getElementById("range-wrong").textContent')
        await browser.press("Backspace", 8)
        for digit in "30":
            await browser.press(digit, ord(digit), digit)
        await tab_to("#at")
        found["right range"] = await browser.run('document.getElementById("range-wrong").textContent')
        found["read"] = [await browser.run('document.querySelector("#charts thead th").textContent')]
        await browser.press("ArrowLeft", 37)
        await browser.settled()
        found["read"].append(await browser.run('document.querySelector("#charts thead th").textContent'))
        await tab_to("#smooth")
        before = await browser.run(READ)
        await browser.press("ArrowDown", 40)
        await browser.settled()
        found["smoothed"] = [before, await browser.run(READ)]
        await tab_to("#settings details summary")
        await enter()
        found["opened"] = await browser.run('document.querySelector("#settings details").open')
        await tab_to("#settings .scroll")
        await tab_to("#settings details:nth-of-type(2) summary")
        await enter()
        await tab_to("#settings details:nth-of-type(2) .scroll")
        found["reached"] = [await browser.run(SEEN), await browser.run(WANTED)]
        found["complaints"], found["requests"] = browser.complaints(), browser.requests()
        found["page"] = page.resolve().as_uri()
    return found


def colours(drawn: list, title: str) -> set[str]:
    return set(dict(drawn)[title])


def test_no_request_leaves_the_file_and_the_console_is_quiet(seen):
    assert set(seen["requests"]) <= {seen["page"], "data:,"}
    assert seen["complaints"] == []


def test_the_table_sorts_by_text_and_number_and_back_with_gaps_last(seen):
    assert seen["orders"] == {
        "given": ["b-run", "a-run", "c-run", "dpo"],
        "run up": ["a-run", "b-run", "c-run", "dpo"],
        "score up": ["b-run", "a-run", "c-run", "dpo"],
        "score down": ["a-run", "b-run", "c-run", "dpo"],
        "lr up": ["b-run", "c-run", "a-run", "dpo"],
    }
    assert seen["sorted"] == ["HLE, thinking", "Sorted by HLE, thinking, descending."]


def test_every_run_is_drawn_and_toggled(seen):
    runs = [f"var(--run-{i})" for i in range(4)]
    titles = [title for title, _ in seen["drawn"]]
    assert len(titles) == 10 and titles[:2] == ["Loss, trace", "Loss, empty"]
    assert colours(seen["drawn"], "Loss, trace") == set(runs), "the DPO run lies over the trace stream"
    assert colours(seen["drawn"], "Loss, empty") == set(runs[:3])
    assert len(dict(seen["drawn"])["Gradient norm"]) == 4
    assert len(dict(seen["drawn"])["Loss, trace"]) == 8, "training and held out"
    assert (seen["spikes"], seen["broken"]) == (1, 0)
    assert seen["stressed"] > 10
    assert colours(seen["without the first"], "Loss, trace") == set(runs[1:])
    assert seen["all"] == seen["drawn"]
    assert all(lines == [] for _, lines in seen["none"])


def test_streams_and_rows_are_toggled(seen):
    titles = [title for title, _ in seen["trace alone"]]
    assert len(titles) == 6 and not any("empty" in title for title in titles)
    assert len(dict(seen["held out alone"])["Loss, trace"]) == 4
    assert dict(seen["held out alone"])["Gradient norm"] == []


def test_steps_are_chosen_and_read(seen):
    assert seen["wrong range"] == "The last step must come after the first." and seen["right range"] == ""
    assert seen["read"] == ["at step 30", "at step 29"]
    assert seen["smoothed"][0] != seen["smoothed"][1]


def test_the_keyboard_reaches_everything_and_is_seen(seen):
    assert seen.get("focus not seen", []) == []
    assert seen["opened"] is True
    reached, wanted = seen["reached"]
    assert reached == wanted


def test_nothing_spills_over_and_the_dark_is_dark(seen):
    assert (seen["spills at 390"], seen["spills at 1440"], seen["spills in print"]) == (0, 0, 0)
    assert (seen["page colour at 390"], seen["page colour at 1440"]) == ("rgb(20, 23, 27)", "rgb(255, 255, 255)")
