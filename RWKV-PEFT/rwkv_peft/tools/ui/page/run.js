// One run, live: what it does now, how far it is, its losses, its answers; stopped, resumed and left for Talk from here.
import { showAnswers } from "./answers.js";
import { chart } from "./chart.js";
import { showJob } from "./job.js";
import { address, download, duration, el, figure, folded, get, number, post, recall, remember, renew, repeat, tell } from "./lib.js";
import { t } from "./texts.js";

const HELD_OUT = ["val_loss", "retain_loss"];
const LOSSES = ["loss", "reward"];
export const live = (run) => ["begins", "running"].includes(run?.state);

// Shows a run in `place` until its page is left. compared(): the folders of other runs to draw beside it; changed(state)
// hears of its state. -> a function that draws it again.
export function showRun(place, folder, signal, { compared = () => [], changed = () => {} } = {}) {
  const state = el("span", { className: "state" }), now = el("p", { className: "now", role: "status" }), figures = el("div", { className: "figures" });
  const bar = el("progress", { "aria-label": t("runs.steps") }), buttons = el("div", { className: "row" }), error = el("div"), losses = el("div"), rates = el("div");
  const answers = el("div"), learned = el("div", { hidden: true }), lessons = el("div"), learning = el("div"), files = el("p", { className: "note" }), job = el("div");
  const log = el("input", { id: "log", type: "checkbox", checked: recall("log", false), onchange: () => { remember("log", log.checked); turn(); } });
  const all = el("div", { hidden: true }, losses, el("p", { className: "note" }, t("runs.losses")), el("div", { className: "row" }, log, el("label", { htmlFor: "log" }, t("runs.log"))));
  const seen = el("div", { hidden: true }, answers, files), back = el("button", { type: "button", onclick: takeBack }, t("learned.back")), further = el("div", { hidden: true }, folded(t("runs.rates"), rates));
  learned.append(lessons, el("div", { className: "row" }, el("a", { className: "button main", href: address("chat", folder) }, t("learned.talk")), back));
  place.append(el("section", { className: "run", "aria-label": folder }, el("h2", {}, folder, " ", state), now, bar, figures, buttons, error, learning, learned, job, all, seen, further));
  let own = { lines: [], next: 0 }, drawn = "", read = new Map(), stopping = false, shown = "";

  async function turn() {
    const run = await get("/api/runs/one", { folder }).catch((problem) => { tell(error, problem); });
    if (!run || signal.aborted) return;
    own = await linesFrom(folder, own);
    const others = compared().filter((one) => one !== folder), { lines } = own;
    for (const other of others) if (!read.has(other)) read.set(other, linesFrom(other)); // a second turn waits for the same
    const beside = await Promise.all(others.map((other) => read.get(other)));
    stopping &&= live(run);
    if (run.job && run.job !== shown) {
      shown = run.job;
      job.replaceChildren();
      showJob(job, shown, signal, { run: true });
    }
    const stamp = JSON.stringify([lines.length, run.state, run.now, run.job, others, log.checked, run.files, stopping]);
    if (stamp === drawn) return;
    drawn = stamp;
    draw(run, lines, others, beside);
    const found = await get("/api/runs/answers", { folder }).catch(() => ({}));
    showAnswers(answers, found);
    learned.hidden = !found["learned.jsonl"]?.some((row) => row.after);
    showAnswers(lessons, { "rows.jsonl": found["learned.jsonl"] }, t("learned"));
    changed(run.state);
  }

  function draw(run, lines, others, beside) {
    const name = LOSSES.find((one) => lines.some((line) => typeof line[one] === "number")) ?? "loss", begun = lines.length > 0;
    const steps = lines.filter((line) => typeof line[name] === "number"), last = steps.at(-1) ?? {}, running = live(run), { done, steps: total } = run;
    const held = lines.filter((line) => typeof line.val_loss === "number").at(-1), left = running && begun && run.now.what === "steps" ? timeLeft(lines, total - done) : null;
    state.className = `state ${running ? "running" : run.state}`;
    state.textContent = t(`state.${run.state}`);
    now.textContent = stopping ? t("runs.stopping") : inWords(run, left);
    const { done: at, of } = running ? run.now : { done, of: total };
    bar.hidden = !running && (run.state === "done" || !of);
    bar.max = of || 1;
    if (of) bar.value = Math.min(at, of); else bar.removeAttribute("value"); // it moves, and says no share
    figures.hidden = !begun;
    figures.replaceChildren(figure(t("chart.step"), total ? t("runs.done", number(done), number(total)) : number(done)), figure(t(`figure.${name}`), number(last[name])),
      held ? figure(t("figure.val_loss"), number(held.val_loss)) : "", left === null ? "" : figure(t("figure.left"), duration(left)));
    const trained = run.files.some((file) => /\.(safetensors|pth)$/.test(file));
    renew(buttons,
      running && run.state === "running" ? el("button", { type: "button", disabled: stopping, onclick: stop }, t("runs.stop")) : "",
      running && stopping ? el("button", { type: "button", onclick: stop }, t("runs.stop at once")) : "",
      !running && run.state !== "done" && total > done && Object.keys(run.flags).length ? el("button", { type: "button", className: "main", onclick: () => resume(run) }, t("runs.resume")) : "",
      trained && !running ? el("a", { className: `button ${run.state === "done" ? "main" : ""}`, href: address("chat", folder) }, t("nav.chat")) : "",
      trained && !running ? el("a", { className: "button", href: address("release", folder) }, t("nav.release")) : "",
      run.files.includes("adapter.safetensors") && !running ? el("button", { type: "button", onclick: learn }, t("learned.learn")) : "");
    for (const part of [all, further]) part.hidden = !begun;
    seen.hidden = !run.files.length && !run.now?.of && !begun;
    files.replaceChildren(t("runs.files"), " ", ...[...run.files, "metrics.jsonl"].flatMap((file) => [download(`${folder}/${file}`, file), " "]));
    if (!begun) return;
    const many = others.length > 0; // each run then has a colour, else each line
    chart(losses, t(`figure.${name}`), [folder, ...others].flatMap((one, n) => linesOf(n ? beside[n - 1].lines : lines, name).map((line, m) =>
      ({ ...line, colour: many ? n : m, label: many ? `${one}: ${line.label}` : line.label }))), { means: many ? "instead" : "beside", log: log.checked, live: running });
    chart(rates, t("figure.lr"), linesOf(lines, "lr").map((line) => ({ ...line, colour: 0 })), { live: running });
  }

  // The seconds that the steps left take, by those of the last steps; null if there are too few to tell.
  function timeLeft(lines, steps) {
    const seconds = lines.slice(1).slice(-20).filter((line) => line.tokens && line.tokens_per_s).map((line) => line.tokens / line.tokens_per_s);
    return seconds.length < 4 ? null : (steps * seconds.reduce((a, b) => a + b, 0)) / seconds.length;
  }

  // What a run does now, or how it ended, in a line.
  function inWords({ state: ended, now: doing, done, steps }, left) {
    if (!doing) return t(`now.${ended === "stopped" && !steps ? "failed" : ended}`, number(done), number(steps));
    if (doing.what === "steps") return left === null ? t("now.steps", number(doing.done), number(doing.of)) : t("now.steps left", number(doing.done), number(doing.of), duration(left));
    return t(`now.${doing.what}`, number(doing.done), number(doing.of));
  }

  // The run takes a second signal as a wish to stop without saving, so that the first button works once.
  async function stop({ target }) {
    target.disabled = true;
    await post("/api/runs/stop", { folder }).then(() => { stopping = true; }, (problem) => tell(error, problem));
    turn();
  }

  // Learns the feedback that Talk has noted; its cards are shown when it has ended well.
  async function learn({ target }) {
    target.disabled = true;
    try {
      const { feedback } = await get("/api/about"), { id } = await post("/api/jobs", { words: ["learn", folder, "--feedback", feedback] });
      learning.replaceChildren();
      const ended = () => { target.disabled = false; drawn = ""; turn(); };
      showJob(learning, id, signal, { open: true, done: ended, otherwise: ended });
    } catch (problem) {
      tell(error, problem);
      target.disabled = false;
    }
  }

  async function takeBack() {
    await post("/api/runs/take_back", { folder }).then(() => learning.replaceChildren(), (problem) => tell(error, problem));
    drawn = "";
    turn();
  }

  async function resume(run) {
    try {
      const argv = Object.entries(run.flags).filter(([flag]) => flag !== "resume").flatMap(([flag, value]) =>
        value === true ? [`--${flag}`] : [`--${flag}`, ...(Array.isArray(value) ? value : [value]).map(String)]);
      await post("/api/jobs", { words: ["train", ...argv, "--resume"] });
      turn();
    } catch (problem) {
      tell(error, problem);
    }
  }

  repeat(signal, 1, turn);
  return turn;
}

// All lines of a run's metrics, from those on that were read before -> {lines, next}.
async function linesFrom(folder, { lines, next } = { lines: [], next: 0 }) {
  for (;;) {
    const part = await get("/api/runs/metrics", { folder, begin: next }).catch(() => null);
    if (!part) return { lines, next };
    lines = part.again ? part.lines : lines.concat(part.lines);
    if (part.next === next) return { lines, next };
    next = part.next;
  }
}

// The lines of a chart: one figure, and of a loss those of held-out rows.
function linesOf(lines, name) {
  const names = name === "lr" ? [name] : [name, ...HELD_OUT];
  return names.map((one, n) => {
    const found = lines.filter((line) => typeof line[one] === "number");
    return { label: t(`figure.${one}`), x: found.map((line) => line.step), y: found.map((line) => line[one]), dash: n ? [6, 4] : undefined };
  }).filter((line) => line.x.length);
}
