// Line charts as SVG. No library: plotly.js would add 4.5 MB to every page, is drawn by colours that no style sheet
// reaches (dark mode, print), and zooms and reads values by mouse only.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (parent) parent.appendChild(made);
  return made;
}

function html(name, text, parent) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  if (parent) parent.appendChild(made);
  return made;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2).replace("-", "−");
  return value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3).replace("-", "−");
}

// About `count` round numbers from low to high.
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((times) => times * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

// Mean of up to `over` points before and at each; gaps stay gaps.
function smoothed(values, over) {
  if (over <= 1) return values;
  return values.map((value, i) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, i - over + 1), i + 1).filter((v) => v !== null);
    return near.reduce((sum, v) => sum + v, 0) / near.length;
  });
}

// Part of a series within [from, to], with one point more on each side, so that lines reach the edge.
function within(steps, values, from, to) {
  let first = steps.findIndex((step) => step >= from);
  let last = steps.findLastIndex((step) => step <= to);
  if (first < 0) first = steps.length - 1;
  first = Math.max(0, first - 1);
  last = Math.min(steps.length - 1, last + 1);
  return [steps.slice(first, last + 1), values.slice(first, last + 1)];
}

function pathOf(steps, values, x, y) {
  let text = "", pen = "M";
  steps.forEach((step, i) => {
    if (values[i] === null) { pen = "M"; return; }
    text += pen + x(step).toFixed(1) + "," + y(values[i]).toFixed(1);
    pen = "L";
  });
  // A point by itself has no length: round ends make it a dot.
  return text.includes("L") || !text ? text : text + "h0";
}

// The value at the last point at or before a step.
function valueAt([steps, values], at) {
  const i = steps.findLastIndex((step) => step <= at);
  return i < 0 ? null : values[i];
}

// Every line that a chart shows now: {run, curve, kind, steps, values, whole}.
function linesOf(chart, runs, state) {
  const found = [];
  for (const run of runs) {
    if (!state.runs.has(run.index)) continue;
    for (const curve of chart.curves) {
      const kinds = run.lines[curve.key] || {};
      for (const kind of ["t", "h"]) {
        if (!kinds[kind] || !state.kinds.has(kind)) continue;
        const [steps, raw] = kinds[kind];
        const whole = [steps, kind === "t" ? smoothed(raw, state.smooth) : raw];
        const [s, v] = within(...whole, state.from, state.to);
        const alone = !(kinds.h && state.kinds.has("h"));
        found.push({ run, curve, kind, alone, steps: s, values: v, whole });
      }
    }
  }
  // Held-out lines over all training lines.
  return found.sort((a, b) => (a.kind === "h") - (b.kind === "h"));
}

function rangeOf(chart, lines, state) {
  if (chart.unit_interval) return [0, 1];
  let low = Infinity, high = -Infinity;
  for (const line of lines) {
    line.steps.forEach((step, i) => {
      if (line.values[i] === null || step < state.from || step > state.to) return;
      low = Math.min(low, line.values[i]);
      high = Math.max(high, line.values[i]);
    });
  }
  if (low > high) return [0, 1];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low < room ? 0 : low - room, high + room];
}

// Draws a chart into its figure, anew.
function draw(figure, chart, data, state) {
  const lines = linesOf(chart, data.runs, state);
  const bands = chart.band && state.kinds.has("t")
    ? data.runs.filter((run) => state.runs.has(run.index) && run.band.length && run.band[0].length) : [];
  const width = Math.max(240, state.width || figure.clientWidth), height = width < 420 ? 190 : 230;
  const box = { left: 46, right: 10, top: 10, bottom: 24 };
  const [low, high] = rangeOf(chart, lines, state);
  const span = Math.max(state.to - state.from, 1e-9);
  const x = (step) => box.left + ((step - state.from) / span) * (width - box.left - box.right);
  const y = (value) => height - box.bottom - ((value - low) / (high - low)) * (height - box.top - box.bottom);

  figure.replaceChildren();
  const caption = html("figcaption", chart.title, figure);
  if (chart.curves.length > 1) html("small", "solid: chosen, dashed: rejected", caption);
  const about = lines.length ? "" : ": nothing to show";
  const picture = svg("svg", {
    class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${chart.title}${about}. Values are below.`,
  }, figure);
  const clip = svg("clipPath", { id: `clip-${chart.key}` }, svg("defs", {}, picture));
  svg("rect", { x: box.left, y: 0, width: width - box.left - box.right + 6, height: height - box.bottom + 6 }, clip);

  const vertical = ticks(low, high, height / 36);
  for (const value of vertical.found) {
    svg("line", { class: "grid", x1: box.left, x2: width - box.right, y1: y(value), y2: y(value) }, picture);
    const text = svg("text", { x: box.left - 6, y: y(value) + 4, "text-anchor": "end" }, picture);
    text.textContent = value.toFixed(vertical.digits).replace("-", "−");
  }
  const most = Math.max(1, Math.min(width / 70, span));
  for (const step of ticks(state.from, state.to, most).found.filter(Number.isInteger)) {
    const text = svg("text", { x: x(step), y: height - 6, "text-anchor": "middle" }, picture);
    text.textContent = step;
  }
  if (!lines.length) {
    const text = svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, picture);
    text.textContent = "nothing to show";
    return;
  }

  const area = svg("g", { "clip-path": `url(#clip-${chart.key})` }, picture);
  const emphasis = (run) => (state.strong === null ? "" : state.strong === run.index ? " strong" : " faint");
  for (const run of bands) {
    const [steps, lows, highs] = run.band;
    const edge = steps.map((step, i) => `${x(step).toFixed(1)},${y(highs[i]).toFixed(1)}`)
      .concat(steps.map((step, i) => `${x(step).toFixed(1)},${y(lows[i]).toFixed(1)}`).reverse());
    svg("path", { class: "band", d: `M${edge.join("L")}Z`, style: `fill: ${run.colour}` }, area);
  }
  for (const line of lines) {
    const kind = line.kind === "h" ? "held-out" : line.alone ? "training alone" : state.runs.size > 2 ? "training many" : "training";
    svg("path", {
      class: `${kind}${line.curve.dashed ? " dashed" : ""}${emphasis(line.run)}`,
      d: pathOf(line.steps, line.values, x, y), style: `stroke: ${line.run.colour}`,
    }, area);
    if (line.kind === "h") {
      const every = Math.ceil(line.steps.length / 25);
      line.steps.forEach((step, i) => {
        if (line.values[i] === null || i % every) return;
        svg("path", {
          class: `point${emphasis(line.run)}`, d: line.run.shape, style: `fill: ${line.run.colour}`,
          transform: `translate(${x(step).toFixed(1)} ${y(line.values[i]).toFixed(1)}) scale(.75)`,
        }, area);
      });
    }
    const marked = chart.judged && line.kind === "t" ? line.run.spikes[line.curve.key] || [] : [];
    for (const step of marked.filter((s) => s >= state.from && s <= state.to)) {
      const value = valueAt(line.whole, step);
      const at = value === null ? box.top + 6 : Math.max(box.top, y(value) - 9);
      svg("path", {
        class: "spike", d: "M-5,-4.5h10L0,4.5Z", transform: `translate(${x(step)} ${at})`, style: `fill: ${line.run.colour}`,
      }, area);
    }
  }
  if (state.at >= state.from && state.at <= state.to) {
    svg("line", { class: "cursor", x1: x(state.at), x2: x(state.at), y1: box.top, y2: height - box.bottom }, picture);
  }
  readout(figure, lines, data, state);
  picture.addEventListener("pointermove", (event) => {
    const place = picture.getBoundingClientRect();
    const inside = ((event.clientX - place.left) / place.width) * width;
    state.readAt(state.from + ((inside - box.left) / (width - box.left - box.right)) * span);
  });
}

// What every run has at the step that is read: the chart in numbers.
function readout(figure, lines, data, state) {
  const said = (line) => [line.curve.label, line.kind === "h" ? "held out" : "training"].filter(Boolean).join(", ");
  const columns = [...new Set(lines.map(said))];
  const table = html("table", "", figure);
  table.className = "readout";
  const head = html("tr", "", html("thead", "", table));
  html("th", `at step ${state.at}`, head);
  for (const column of columns) html("th", column, head);
  const body = html("tbody", "", table);
  for (const run of data.runs) {
    const own = lines.filter((line) => line.run === run);
    if (!own.length) continue;
    const row = html("tr", "", body), name = html("th", "", row);
    name.scope = "row";
    name.append(mark(run), run.name);
    for (const column of columns) {
      const line = own.find((one) => said(one) === column);
      html("td", line ? number(valueAt(line.whole, state.at)) : "–", row);
    }
  }
}

function mark(run) {
  const made = svg("svg", { class: "mark", viewBox: "-6 -6 12 12", "aria-hidden": "true" });
  svg("path", { d: run.shape, style: `fill: ${run.colour}` }, made);
  return made;
}
