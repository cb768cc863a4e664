// Charts of lines over steps, which may be smoothed and on a log scale; a screen reader reads each line's numbers.
import { el, number, recall, remember } from "./lib.js";

const SMOOTHED = { 0: "as measured", 0.9: "over some 10 steps", 0.98: "over some 50 steps" };

// The settings of charts -> {box: their fields, of: () => {smooth, log}}; change() hears of each change.
export function chartSettings(change) {
  const kept = { smooth: "0", log: false, ...recall("chart", {}) };
  const take = (name, value) => {
    kept[name] = value;
    remember("chart", kept);
    change();
  };
  const smooth = el("select", { id: "smooth", onchange: () => take("smooth", smooth.value) },
    Object.entries(SMOOTHED).map(([value, text]) => el("option", { value, selected: value === kept.smooth }, text)));
  const log = el("input", { id: "log", type: "checkbox", checked: kept.log, onchange: () => take("log", log.checked) });
  return {
    box: el("div", { className: "row" }, el("label", { htmlFor: "smooth" }, "Loss"), smooth, log, el("label", { htmlFor: "log" }, "log scale")),
    of: () => ({ smooth: Number(kept.smooth), log: kept.log }),
  };
}

// Draws lines = [{label, colour: a number, dash, x, y}], each with its own steps, into `place`.
export function chart(place, title, lines, { smooth = 0, log = false } = {}) {
  const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const logarithmic = log && lines.every((line) => line.y.every((y) => y > 0));
  const rows = lines.map((line) => {
    const values = line.dash ? line.y : smoothed(line.y, smooth), at = new Map(line.x.map((x, n) => [x, values[n]]));
    return steps.map((x) => at.get(x) ?? null);
  });
  const style = getComputedStyle(document.documentElement), colours = style.getPropertyValue("--lines").trim().split(" ");
  const axis = { stroke: style.getPropertyValue("--soft"), grid: { stroke: style.getPropertyValue("--line"), width: 0.5 } };
  const ticks = (plot, found) => found.map((tick) => (tick === null ? null : number(tick)));
  const options = {
    title, width: Math.max(place.clientWidth, 260), height: 260, axes: [axis, { ...axis, size: 70, values: ticks }],
    legend: { markers: { dash: (plot, n) => (lines[n - 1]?.dash ? "dashed" : "solid") } }, scales: { x: { time: false }, y: logarithmic ? { distr: 3 } : {} },
    series: [{ label: "step" }, ...lines.map((line) => ({
      label: line.label, stroke: colours[line.colour] ?? `hsl(${137.5 * line.colour} 60% 50%)`, width: line.dash ? 2.2 : 1.7, dash: line.dash, spanGaps: true,
      points: { show: line.x.length < 20 }, value: (plot, value) => (value === null ? "–" : number(value)),
    }))],
  };
  place.replaceChildren();
  if (!steps.length) return;
  const { root } = new uPlot(options, [steps, ...rows], place);
  const canvas = root.querySelector("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", [`Chart of ${title} over steps`, ...lines.map(inWords)].join("; "));
}

// An exponential mean, each value weighing `smooth` times the one after it.
function smoothed(values, smooth) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    sum = smooth * sum + value;
    weight = smooth * weight + 1;
    return sum / weight;
  });
}

function inWords({ label, x, y }) {
  const lowest = y.reduce((best, value, n) => (value < y[best] ? n : best), 0);
  const at = (n) => `${number(y[n])} at step ${number(x[n] + 1)}`;
  return `${label}: from ${at(0)} to ${at(y.length - 1)}, lowest ${at(lowest)}`;
}
