// Charts of lines over steps: pale as measured, a mean over them, and a text with their numbers, which a screen reader reads.
import { el, number } from "./lib.js";
import { t } from "./texts.js";

const HEIGHT = 260;
const SPAN = 20; // a mean is over a twentieth of a line's values

// Draws lines = [{label, colour: a number, dash, x, y}], each with its own steps, into `place`. means: "beside" the lines or
// "instead" of them, dashed ones excepted; log: a logarithmic axis, if all values are above 0; live: more values will come.
export async function chart(place, title, lines, { means = "", log = false, live = false } = {}) {
  if (!place.childElementCount) place.append(...frame());
  const [picture, text] = place.children, drawn = means ? lines.flatMap((line) => withMean(line, means)) : lines;
  const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b), logarithmic = log && lines.every((line) => line.y.every((y) => y > 0));
  const rows = drawn.map((line) => {
    const at = new Map(line.x.map((x, n) => [x, line.y[n]]));
    return steps.map((x) => at.get(x) ?? null);
  });
  const style = getComputedStyle(document.documentElement), colours = style.getPropertyValue("--lines").trim().split(" ");
  const colourOf = (line) => colours[line.colour] ?? `hsl(${137.5 * line.colour} 60% 50%)`;
  const axis = { stroke: style.getPropertyValue("--soft"), grid: { stroke: style.getPropertyValue("--line"), width: 0.5 } };
  const ticks = (plot, found) => found.map((tick) => (tick === null ? null : number(tick)));
  const options = {
    title, width: Math.max(picture.clientWidth, HEIGHT), height: HEIGHT, axes: [axis, { ...axis, size: 60, values: ticks }],
    legend: { markers: { dash: (plot, n) => (drawn[n - 1]?.dash ? "dashed" : "solid") } },
    scales: { x: { time: false }, y: logarithmic ? { distr: 3 } : { range: mostOf } },
    series: [{ label: t("chart.step") }, ...drawn.map((line) => ({
      label: line.label, stroke: line.pale ? `color-mix(in srgb, ${colourOf(line)} 40%, transparent)` : colourOf(line), width: line.dash ? 2.2 : 1.7,
      dash: line.dash, spanGaps: true, points: { show: line.x.length < 20 }, value: (plot, value) => (value === null ? "–" : number(value)),
    }))],
  };
  picture.plot?.destroy();
  picture.plot = steps.length ? new uPlot(options, [steps, ...rows], picture) : null;
  if (!picture.plot) return;
  const canvas = picture.querySelector("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", t("chart.name", title));
  await null; // its scales are there
  if (!picture.plot) return;
  const { min, max } = picture.plot.scales.y, outside = !logarithmic && drawn.some((line) => line.y.some((y) => y < min || y > max));
  const words = [...lines.map(inWords), ...(outside ? [t("chart.outside")] : [])].join("\n");
  text.ariaLive = live ? "off" : "polite"; // a screen reader reads it at the end, and not each second
  if (words !== text.textContent) text.textContent = words;
}

// The places of a picture, as wide as the page lets it be, and of its text.
function frame() {
  const picture = el("div", { className: "picture" });
  new ResizeObserver(() => picture.plot?.setSize({ width: picture.clientWidth, height: HEIGHT })).observe(picture);
  return [picture, el("p", { className: "note" })];
}

function withMean(line, means) {
  if (line.dash || line.y.length < 2 * SPAN) return [line];
  const mean = { ...line, label: t("chart.mean", line.label), y: meansOf(line.y) };
  return means === "instead" ? [mean] : [{ ...line, pale: true }, mean];
}

// The mean about each value. At the start it is over fewer values, so that it falls as steeply as they do.
function meansOf(values) {
  const sums = [0], half = Math.round(values.length / SPAN / 2);
  for (const value of values) sums.push(sums.at(-1) + value);
  return values.map((_, n) => {
    const reach = Math.min(half, n), begin = n - reach, end = Math.min(n + reach + 1, values.length);
    return (sums[end] - sums[begin]) / (end - begin);
  });
}

// The range of an axis: of each line that is shown all values but outliers, by Tukey's outer fences, so that the steep first steps of a
// loss do not flatten the rest.
function mostOf(plot) {
  const fences = plot.series.flatMap(({ show, idxs }, n) => {
    const values = n && show ? plot.data[n].slice(idxs[0], idxs[1] + 1).filter((y) => y !== null).sort((a, b) => a - b) : [];
    if (!values.length) return [];
    const [low, high] = [0.25, 0.75].map((share) => values[Math.round(share * (values.length - 1))]), reach = 3 * (high - low);
    return [Math.max(values[0], low - reach), Math.min(values.at(-1), high + reach)];
  });
  return fences.length ? uPlot.rangeNum(Math.min(...fences), Math.max(...fences), 0.1, true) : [0, 1];
}

function inWords({ label, x, y }) {
  const lowest = y.reduce((best, value, n) => (value < y[best] ? n : best), 0);
  const at = (n) => t("chart.at", number(y[n]), number(x[n] + 1));
  return t("chart.words", label, at(0), at(y.length - 1), at(lowest));
}
