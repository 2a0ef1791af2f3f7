"""`bvpo report`: what it says of folders that are none, and that its page is safe, whole and readable."""

import base64
import datetime
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_bvpo.cli import bvpo
from megatron_bvpo.reporting.html_page import PARTS, page
from megatron_bvpo.reporting.run_files import read_runs
from megatron_bvpo.reporting.run_versions import write_versions
from megatron_bvpo.reporting.runs_table import runs_table
from tests.unit.report_runs import made_run, made_scores

EVIL = "<script>alert(1)</script>"
NOW = datetime.datetime(2026, 1, 2, 3, 4)


def page_of(*folders: Path) -> str:
    return page(read_runs(folders), NOW)


# --- what is no run, and what can be no page ---


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((), "RUN: a run is needed; name the run's --output_dir"),
        (("{tmp}/nowhere",), "nowhere: there is no logging.jsonl; name the run's --output_dir"),
        (("{tmp}",), "did you mean {tmp}/other {tmp}/run?"),
        (("{tmp}/run", "{tmp}/run/args.json"), "args.json: there is no logging.jsonl"),
        (("{tmp}/run", "--html", "{tmp}"), "--html: is a folder; name a file: {tmp}/runs.html"),
        (("{tmp}/run", "--html", "{tmp}/run/args.json"), "--html: is no name of a page; let it end in .html"),
        (("{tmp}/run", "--html", "{tmp}/no/page.html"), "no: --html: there is no such folder; make it first"),
    ],
)
def test_a_mistake_is_told_in_a_line(tmp_path, capsys, arguments, complaint):
    for name in ("run", "other"):
        made_run(tmp_path / name, steps=3)
    before = (tmp_path / "run" / "args.json").read_text()
    assert bvpo(["report", *(word.format(tmp=tmp_path) for word in arguments)]) == 2
    told = capsys.readouterr()
    assert complaint.format(tmp=tmp_path) in told.err and told.err.count("\n") == 1 and told.out == ""
    assert (tmp_path / "run" / "args.json").read_text() == before
    assert not (tmp_path / "run" / "bvpo.png").exists(), "nothing is made before all is checked"


def test_terminal_table_plot_and_page(tmp_path, capsys):
    runs = [made_run(tmp_path / name, steps=20, seed=i) for i, name in enumerate(("a", "b"))]
    target = tmp_path / "runs.html"
    # A run that is named twice is one.
    assert bvpo(["report", *map(str, runs), str(runs[0]), "--html", str(target)]) == 0
    told = capsys.readouterr().out
    assert told.count("| trace rewards/margins |") == 2 and f"Page: {target}" in told
    assert all((run / "bvpo.png").stat().st_size > 10_000 for run in runs)
    assert "2 BVPO runs" in target.read_text()


def test_a_folder_that_cannot_be_written_and_a_run_without_steps(tmp_path, capsys, recwarn):
    """Somebody else's run, and one that has just begun."""
    theirs, begun = made_run(tmp_path / "theirs", steps=20), made_run(tmp_path / "begun", steps=1)
    (theirs / "bvpo.png").mkdir()
    (begun / "logging.jsonl").write_text("")
    assert bvpo(["report", str(theirs), str(begun), "--html", str(tmp_path / "runs.html")]) == 0
    told = capsys.readouterr().out
    assert "| trace rewards/margins |" in told and "bvpo.png cannot be written (Is a directory)" in told
    assert "No step is logged.\n\nPlot: none\n" in told and (tmp_path / "runs.html").is_file()
    assert not list(recwarn)


# --- folders that lack something, or hold something else ---


def test_a_model_that_was_evaluated_and_not_trained(tmp_path, capsys):
    """The base stands beside the runs with its scores, and nothing is said of a training; a folder of runs is none."""
    made_scores(tmp_path / "base" / "eval", {("AIME", "thinking"): 0.2})
    run = made_run(tmp_path / "run", steps=20)
    made_scores(run / "eval", {("AIME", "thinking"): 0.6})
    target = tmp_path / "runs.html"
    assert bvpo(["report", str(tmp_path / "base"), str(run), "--html", str(target)]) == 0
    assert f"{tmp_path / 'base'} was evaluated, and not trained" in capsys.readouterr().out
    text = target.read_text()
    assert "run beats base by 40.0" in text and "was evaluated, and not trained here." in text
    assert "args.json is not there" not in text and not (tmp_path / "base" / "bvpo.png").exists()
    base, trained = read_runs([tmp_path / "base", run])
    steps = [row.cells[-1].text for row in runs_table([base, trained]).rows]
    assert steps == ["–", "20 of 20"]
    assert bvpo(["report", str(tmp_path), "--html", str(target)]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_run_without_anything_but_its_log(tmp_path):
    folder = made_run(tmp_path / "bare", steps=5)
    (folder / "args.json").unlink()
    text = page_of(folder)
    assert "args.json is not there: its settings are not known." in text
    assert "No report of <code>bvpo pairs</code> lies beside" in text
    assert 'id="scores"' not in text


@pytest.mark.parametrize(
    "file, content, note",
    [
        ("args.json", "{", "args.json cannot be read"),
        ("args.json", "[1]", "args.json holds no JSON object"),
        ("args.json", b"\xff\xfe\x00", "args.json cannot be read"),
        ("logging.jsonl", "no log\n", "logging.jsonl has no step yet."),
        ("versions.json", "{", None),
        ("scores.json", "{", ": scores.json cannot be read"),
        ("eval/scores.json", '{"version": 2, "scores": []}', "eval/scores.json has version 2, expected 1; left out."),
        ("eval/a/scores.json", '{"version": 1, "scores": [{"title": "x"}], "missing": []}', "is damaged"),
        ("eval/scores.json", "[]", "eval/scores.json is no file of scores; left out."),
    ],
)
def test_a_file_that_cannot_be_used_becomes_a_note_and_the_rest_goes_on(tmp_path, file, content, note):
    good, bad = made_run(tmp_path / "good", steps=12), made_run(tmp_path / "bad", steps=12)
    (bad / file).parent.mkdir(parents=True, exist_ok=True)
    (bad / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    runs = read_runs([good, bad])
    assert runs[0].notes == []
    assert [note in f": {told}" for told in runs[1].notes] == ([True] if note else [])
    assert "good" in page(runs, NOW)


def test_nothing_but_runs_without_steps_or_with_numbers_that_are_none(tmp_path):
    folder = made_run(tmp_path / "run", steps=3)
    (folder / "logging.jsonl").write_text('{"iteration": "1/3", "loss": NaN, "grad_norm": Infinity, "alpha": "x"}\n')
    text = page_of(folder)
    data = script_data(text)
    assert data["runs"][0]["lines"]["grad_norm"]["t"] == [[1], [None]]
    assert data["runs"][0]["spikes"]["grad_norm"] == [1]
    assert "NaN" not in json.dumps(data) and "nan" not in html.unescape(re.sub(r"<script.*", "", text, flags=re.S))


# --- what comes from files is text ---


class Tags(HTMLParser):
    """Which elements a page has, and the text of one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def script_data(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.S)[1])


@pytest.fixture
def evil_run(tmp_path) -> Path:
    """A run whose every name and text would be markup."""
    data = tmp_path / "data"
    data.mkdir()
    (data / f"{EVIL.replace('/', '')}.jsonl").write_text("{}\n")
    (data / f"{EVIL.replace('/', '')}.report.md").write_text(f"# Pairs\n{EVIL}\n\n![the same in pictures](x.png)\n")
    folder = made_run(
        tmp_path / "<script>alert('x')<" / '"><img src=x onerror=alert(1)>',
        steps=30,
        settings={
            "dataset": [str(data / f"{EVIL.replace('/', '')}.jsonl")],
            EVIL: EVIL,
            "system": "</script></style><img src=http://host/x>",
            "hub_token": "hf_0123456789abcdefghij",
        },
        versions={EVIL: f"{EVIL}{{{{ 7 * 7 }}}}"},
    )
    made_scores(folder / "eval", {(EVIL, EVIL): 0.4}, missing=[(EVIL, None, EVIL)])
    return folder


def test_markup_in_files_stays_text(evil_run, tmp_path):
    plain = page_of(made_run(tmp_path / "plain", steps=30))
    text = page_of(evil_run)
    tags = Tags(text).found
    assert [tag for tag, _ in tags].count("script") == [tag for tag, _ in Tags(plain).found].count("script") == 2
    assert [attributes for tag, attributes in tags if tag == "img"] == []
    handlers = {name for _, attributes in tags for name in attributes if name.startswith("on")}
    assert handlers == set()
    assert "<script>alert" not in text and "</script></style>" not in text
    assert html.escape(EVIL) in text, "it is shown, as text"
    assert "{{ 7 * 7 }}" in text, "no template"
    assert script_data(text)["runs"][0]["name"] == '"><img src=x onerror=alert(1)>'
    assert "hf_0123456789abcdefghij" not in text


def test_the_page_names_no_address(evil_run, tmp_path):
    """Nothing in it makes a browser fetch: no src, href, url() or import but fragments and data."""
    made_run(tmp_path / "plain", steps=30)
    for text in (page_of(tmp_path / "plain"), page_of(evil_run)):
        for tag, attributes in Tags(text).found:
            for name in ("src", "href", "srcset", "action", "data", "poster"):
                assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    parts = "".join((PARTS / name).read_text() for name in ("page.css", "charts.js", "page.js", "page.html.j2"))
    assert re.findall(r"url\((?!#)|@import|\bimport\b|fetch\(|XMLHttp", parts) == []
    assert set(re.findall(r"\w+://[^\"\s]+", parts)) == {"http://www.w3.org/2000/svg"}, "a name, which nothing asks for"
    assert "default-src 'none'" in text


def test_reports_versions_and_secrets(tmp_path):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("{}\n")
    (tmp_path / "pairs.report.md").write_text("# Pairs\n\n812 prompts\n\n![the same in pictures](pairs.report.png)\n")
    picture = b"\x89PNG picture"
    (tmp_path / "pairs.report.png").write_bytes(picture)
    settings = {"dataset": [f"{rows}#500"], "hub_token": "my-own-secret-1", "system": "say my-own-secret-1"}
    folders = [made_run(tmp_path / name, steps=12, settings=settings) for name in ("a", "b")]
    write_versions(folders[0])
    text = page_of(*folders)
    assert text.count("812 prompts") == 1 and "of a, b</span>" in text
    assert f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"' in text
    assert "my-own-secret-1" not in text and "the same in pictures]" not in text
    assert json.loads((folders[0] / "versions.json").read_text())["torch"] in text


def test_the_table_has_scores_settings_and_what_was_learnt(tmp_path):
    folders = []
    for name, lr, score in (("a", 5e-5, 0.18), ("b", 1e-6, 0.28)):
        folder = made_run(tmp_path / name, steps=40, settings={"lr": lr, "seed": 3}, spikes=(35,))
        made_scores(folder / "eval", {("HLE", "thinking"): score, ("HLE", "empty"): score / 2})
        folders.append(folder)
    text = page_of(*folders, made_run(tmp_path / "c", steps=10, streams=("trace",), settings={"seed": 4}))
    heads = re.findall(r'<button type="button" title="[^"]*">([^<]*)</button>', text.replace("_<wbr>", "_"))
    assert heads[:3] == ["run", "HLE, thinking", "HLE, empty"]
    assert heads[3:9] == ["dataset", "lora_rank", "lora_alpha", "lr", "beta", "target_modules"]
    learnt = ["loss", "trace accuracy", "trace margin", "empty accuracy", "empty margin", "α", "spikes", "steps"]
    assert heads[9:] == ["bvpo_alpha", "seed", *learnt]
    rows = re.findall(r'<th scope="row" data-sort="(\w)".*?</tr>', text, re.S)
    assert rows == ["a", "b", "c"]
    assert re.search(r'<td data-sort="18"[^>]*>18\.0 <small>14\.\d to 22\.\d</small>', text)
    assert "b beats a by 10.0 ± " in text and " on HLE with thinking (400 questions, p &lt; .001" in text
    assert re.search(r'<td data-sort="40"[^>]*>40 of 40<', text)
    assert text.count("grad_norm: 1 at step 35") == 2


# --- colours ---


def variables(css: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6});", css))


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two colours, from 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_can_be_read_light_and_dark():
    css = (PARTS / "page.css").read_text()
    light, dark = re.findall(r":root\s*\{([^}]*)\}", css)
    assert variables(light).keys() == variables(dark).keys()
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for colours in (variables(light), variables(dark)):
        front = ["text", "muted", "link", "control", "focus", *(f"run-{i}" for i in range(8))]
        assert colours.keys() == {*front, "page", "panel", "line"}, "a colour that is not judged"
        for name in front:
            assert contrast(colours[name], colours["page"]) >= 4.5, name
        for name in ("text", "muted"):
            assert contrast(colours[name], colours["panel"]) >= 4.5, name
    elsewhere = css.replace(light, "").replace(dark, "")
    elsewhere += "".join((PARTS / name).read_text() for name in ("charts.js", "page.js", "page.html.j2"))
    # White behind pictures, which are drawn for it.
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b(?!-)", re.sub(r'href="#[^"]*"', "", elsewhere)) == ["#ffffff"]
