// What can be done with the page: sort the table, choose runs, streams, rows and steps.
"use strict";

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("page-data").textContent);
data.runs.forEach((run, index) => {
  run.index = index;
  run.colour = `var(--run-${index % 8})`;
  run.shape = data.shapes[index % data.shapes.length];
});

// --- the table ---

function sortable(table) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(a.cells[column].dataset.sort, b.cells[column].dataset.sort, up));
      table.tBodies[0].append(...rows);
      byId("sorted").textContent = `Sorted by ${head.textContent.trim()}, ${up ? "ascending" : "descending"}.`;
    });
  });
}

// Cells without a value come last in either direction.
function compare(a, b, up) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const numbers = a !== "" && b !== "" && !isNaN(a) && !isNaN(b);
  const order = numbers ? a - b : a.localeCompare(b, undefined, { numeric: true });
  return up ? order : -order;
}

// --- the curves ---

function bounds() {
  let low = Infinity, high = -Infinity;
  for (const run of data.runs) {
    for (const kinds of Object.values(run.lines)) {
      for (const [steps] of Object.values(kinds)) {
        low = Math.min(low, steps[0]);
        high = Math.max(high, steps[steps.length - 1]);
      }
    }
  }
  return low > high ? [0, 1] : [low, Math.max(high, low + 1)];
}

const [first, last] = bounds();
const state = { runs: new Set(), streams: new Set(), kinds: new Set(), from: first, to: last, at: last, smooth: 1, strong: null };
const figures = new Map(data.charts.map((chart) => [chart, byId("charts").appendChild(document.createElement("figure"))]));

function checked(name) {
  return [...document.querySelectorAll(`input[name=${name}]:checked`)].map((box) => box.value);
}

function redraw() {
  state.runs = new Set(checked("run").map(Number));
  state.streams = new Set(checked("stream"));
  state.kinds = new Set(checked("kind"));
  for (const [chart, figure] of figures) {
    const used = data.runs.some((run) => chart.curves.some((curve) => run.lines[curve.key]));
    figure.hidden = !used || (chart.stream !== "" && !state.streams.has(chart.stream));
    if (!figure.hidden) draw(figure, chart, data, state);
  }
}

let waiting = false;
function redrawSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; redraw(); });
}

state.readAt = (step) => {
  state.at = Math.round(Math.min(Math.max(step, state.from), state.to));
  byId("at").value = state.at;
  byId("at-text").textContent = state.at;
  redrawSoon();
};

// Steps that make no range leave the picture as it is and are marked.
function chooseRange() {
  const from = byId("from").value === "" ? first : Number(byId("from").value);
  const to = byId("to").value === "" ? last : Number(byId("to").value);
  const wrong = !(from < to);
  byId("range-wrong").textContent = wrong ? "The last step must come after the first." : "";
  byId("to").setAttribute("aria-invalid", wrong);
  if (wrong) return;
  [state.from, state.to] = [Math.max(from, first), Math.min(to, last)];
  if (!(state.from < state.to)) [state.from, state.to] = [first, last];
  byId("at").min = state.from;
  byId("at").max = state.to;
  state.readAt(state.at);
}

function toggleAll(on) {
  document.querySelectorAll("input[name=run]").forEach((box) => { box.checked = on; });
  redraw();
}

// One run's lines stand out while the pointer or the keyboard's focus is on its name.
function stress(index) {
  if (data.runs.length < 2) return;
  state.strong = index !== null && state.runs.has(index) ? index : null;
  redrawSoon();
}

function start() {
  sortable(byId("run-table"));
  byId("from").value = first;
  byId("to").value = last;
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  document.querySelectorAll("#controls input[type=checkbox]").forEach((box) => box.addEventListener("change", redraw));
  byId("from").addEventListener("change", chooseRange);
  byId("to").addEventListener("change", chooseRange);
  byId("at").addEventListener("input", () => state.readAt(Number(byId("at").value)));
  byId("smooth").addEventListener("change", () => { state.smooth = Number(byId("smooth").value); redraw(); });
  byId("all-runs").addEventListener("click", () => toggleAll(true));
  byId("no-runs").addEventListener("click", () => toggleAll(false));
  document.querySelectorAll("label[data-run]").forEach((label) => {
    const own = Number(label.dataset.run), box = label.querySelector("input");
    label.addEventListener("pointerenter", () => stress(own));
    label.addEventListener("pointerleave", () => stress(null));
    box.addEventListener("focus", () => stress(box.matches(":focus-visible") ? own : null));
    box.addEventListener("blur", () => stress(null));
  });
  chooseRange();
  redraw();
  new ResizeObserver(redrawSoon).observe(byId("charts"));
  // Three charts side by side on paper, with text of a size to read, and the data's reports unfolded.
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("#data details").forEach((report) => { report.open = true; });
    state.width = 340;
    redraw();
  });
  window.addEventListener("afterprint", () => { state.width = 0; redraw(); });
}

start();
