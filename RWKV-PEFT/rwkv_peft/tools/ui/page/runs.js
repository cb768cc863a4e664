// Runs: those below the folder, live; several in one picture.
import { showAnswers } from "./answers.js";
import { chart } from "./chart.js";
import { address, download, duration, el, figure, get, number, post, recall, remember, renew, repeat, tell, words } from "./lib.js";
import { t } from "./texts.js";

const HELD_OUT = ["val_loss", "retain_loss"];
const LOSSES = ["loss", "reward"];
const LISTED = 20; // runs
const ORDERS = {
  newest: (one, other) => other.modified - one.modified,
  name: (one, other) => one.folder.localeCompare(other.folder, "en", { numeric: true }),
};

export async function runsPage(place, about, signal, chosen) {
  const list = el("ul", { className: "list" }), jobs = el("ul", { className: "list" }), view = el("div");
  const find = el("input", { type: "search", placeholder: t("runs.find"), "aria-label": t("runs.find"), oninput: drawList });
  const order = el("select", { "aria-label": t("runs.order"), onchange: drawList }, Object.keys(ORDERS).map((value) => el("option", { value }, t(`runs.order.${value}`))));
  const which = el("div", { className: "row", hidden: true }, find, order);
  const more = el("button", { type: "button", onclick: () => { most = Infinity; drawList(); } });
  place.append(el("h1", {}, t("nav.runs")), el("div", { className: "columns side" },
    el("div", {}, which, list, more, el("h2", {}, t("runs.commands")), jobs), view));
  let most = LISTED;
  const compared = new Set(recall("compared", []));
  let runs = [], commands = [], shown = null;
  const job = chosen.startsWith("job:") ? chosen.slice(4) : "";

  await repeat(signal, 3, async () => {
    try {
      const [found, started] = await Promise.all([get("/api/runs"), get("/api/jobs")]);
      [runs, commands] = [found, started];
      drawList();
      renew(jobs, ...started.slice(0, 12).map((one) => el("li", {},
        el("a", { href: `#runs:job:${one.id}`, "aria-current": one.id === job ? "true" : null }, `${one.id}: ${one.words.slice(0, 1)} ${target(one.words)}`), badge(one))));
      if (!jobs.childElementCount) jobs.append(el("li", { className: "note" }, t("runs.no command")));
      if (shown === null) open(started);
    } catch (problem) {
      tell(list, problem);
    }
  });

  function drawList() {
    const folder = job ? "" : chosen, asked = find.value.toLowerCase().split(/\s+/);
    const found = runs.filter((run) => asked.every((word) => run.folder.toLowerCase().includes(word))).sort(ORDERS[order.value]);
    which.hidden = runs.length < 2;
    more.hidden = found.length <= most;
    more.textContent = t("runs.all", number(found.length));
    renew(list, ...found.slice(0, most).map((run) => {
      const box = el("input", { type: "checkbox", checked: compared.has(run.folder), "aria-label": t("runs.compare", run.folder), title: t("runs.compare", run.folder) });
      box.addEventListener("change", () => {
        if (box.checked) compared.add(run.folder); else compared.delete(run.folder);
        remember("compared", [...compared]);
        shown?.again();
      });
      return el("li", {}, box, el("a", { href: address("runs", run.folder), "aria-current": run.folder === folder ? "true" : null }, run.folder),
        el("span", { className: `state ${run.running ? "running" : ""}` }, run.running ? t("state.running") : ""));
    }));
    if (!runs.length) list.append(el("li", {}, el("span", { className: "note" }, t("runs.none"), " ", el("a", { href: "#train" }, t("runs.start")))));
    else if (!found.length) list.append(el("li", { className: "note" }, t("runs.not found")));
    if (runs.length > 1) list.append(el("li", { className: "note" }, t("runs.mark")));
  }

  function open(started) {
    const one = job ? started.find((found) => found.id === job) : null;
    const folder = job ? (one ? folderOf(one.words) : "") : chosen || runs[0]?.folder || "";
    shown = { again() {} };
    const shows = folder && (!job || one?.words[0] === "train");
    const output = job ? showJob(view, job, signal, () => !shown.running) : null;
    if (shows) showRun(folder, output);
    if (chosen && matchMedia("(max-width: 850px)").matches) view.scrollIntoView(); // below the lists there
    if (!job && !folder) view.append(el("p", { className: "note" }, t("runs.nothing")));
  }

  // output: that of the run's command, which is folded when the run has something to show; null for a run of others.
  function showRun(folder, output) {
    const place = el("div");
    view.append(place);
    const title = el("h2", {}, folder), figures = el("div", { className: "figures" }), bar = el("progress", { max: 1, value: 0, "aria-label": t("runs.steps") });
    const buttons = el("div", { className: "row" }), error = el("div"), losses = el("div"), rates = el("div"), answers = el("div"), files = el("p", { className: "note" });
    const log = el("input", { id: "log", type: "checkbox", checked: recall("log", false), onchange: () => { remember("log", log.checked); shown.again(); } });
    const begins = el("p", { className: "note" }, t("runs.begins")), all = el("div", { hidden: true }, title, figures, bar, buttons, error, losses,
      el("div", { className: "row" }, log, el("label", { htmlFor: "log" }, t("runs.log"))), answers, files, el("details", {}, el("summary", {}, t("runs.rates")), rates));
    place.append(begins, all);
    let own = { lines: [], next: 0 }, drawn = "", read = new Map(), stopping = false;

    async function turn() {
      own = await linesFrom(folder, own);
      const { lines } = own;
      const run = runs.find((one) => one.folder === folder);
      const begun = commands.some((one) => one.id === job && one.state === "running") && !view.querySelector(".job .failed");
      begins.hidden = Boolean(run) || !begun;
      all.hidden = !run;
      if (!run) return;
      if (output && lines.length && !drawn) output.open = false;
      for (const other of compared) if (other !== folder && !read.has(other)) read.set(other, (await linesFrom(other)).lines);
      stopping &&= run.running;
      shown.running = run.running;
      const stamp = JSON.stringify([lines.length, run.running, begun, [...compared].sort(), log.checked, run.files]);
      if (stamp === drawn) return;
      drawn = stamp;
      draw(run, lines, begun);
      showAnswers(answers, (await get("/api/runs/answers", { folder }).catch(() => ({}))));
    }

    function draw(run, lines, begun) {
      const name = LOSSES.find((one) => lines.some((line) => typeof line[one] === "number")) ?? "loss";
      const steps = lines.filter((line) => typeof line[name] === "number"), last = steps.at(-1) ?? {};
      const held = lines.filter((line) => typeof line.val_loss === "number").at(-1);
      const done = steps.length ? last.step + 1 : 0, total = run.steps ?? 0;
      const speeds = steps.slice(1).slice(-20).filter((line) => line.tokens && line.tokens_per_s).map((line) => line.tokens / line.tokens_per_s);
      const pace = speeds.reduce((a, b) => a + b, 0) / Math.max(speeds.length, 1);
      const command = commands.find((one) => one.words[0] === "train" && folderOf(one.words) === folder);
      figures.replaceChildren(figure(t("runs.state"), t(`state.${run.running ? "running" : total && done >= total ? "done" : begun ? "begins" : "stopped"}`)),
        figure(t("chart.step"), total ? t("runs.done", number(done), number(total)) : number(done)), figure(t(`figure.${name}`), number(last[name])),
        figure(t("figure.val_loss"), number(held?.val_loss)), figure(t("figure.lr"), number(last.lr, 3)), figure(t("figure.speed"), last.tokens_per_s ? number(Math.round(last.tokens_per_s)) : "–"),
        run.running && total ? figure(t("figure.left"), speeds.length < 4 ? t("figure.later") : duration((total - done) * pace)) : "");
      bar.max = total || 1;
      bar.value = Math.min(done, total || 1);
      renew(buttons,
        run.running ? el("button", { type: "button", disabled: stopping, onclick: stop }, t(stopping ? "runs.stopping" : "runs.stop")) : "",
        run.running && stopping ? el("button", { type: "button", onclick: stop }, t("runs.stop at once")) : "",
        !run.running && !begun && total > done && Object.keys(run.flags).length ? el("button", { type: "button", className: "main", onclick: () => resume(run) }, t("runs.resume")) : "",
        run.files.some((file) => /\.(safetensors|pth)$/.test(file)) ? el("a", { className: "button", href: address("release", folder) }, t("nav.release")) : "",
        run.files.length ? el("a", { className: `button ${total && done >= total ? "main" : ""}`, href: address("chat", folder) }, t("nav.chat")) : "",
        command && !output ? el("a", { className: "button", href: `#runs:job:${command.id}` }, t("job.output")) : "");
      files.replaceChildren(t("runs.files"), " ", ...[...run.files, "metrics.jsonl"].flatMap((name) => [download(`${folder}/${name}`, name), " "]));
      const others = [...compared].filter((one) => one !== folder);
      const many = others.length > 0; // each run then has a colour, else each line
      chart(losses, t(`figure.${name}`), [folder, ...others].flatMap((one, n) => linesOf(n ? read.get(one) : lines, name).map((line, m) =>
        ({ ...line, colour: many ? n : m, label: many ? `${one}: ${line.label}` : line.label }))), { means: many ? "instead" : "beside", log: log.checked, live: run.running });
      chart(rates, t("figure.lr"), linesOf(lines, "lr").map((line) => ({ ...line, colour: 0 })), { live: run.running });
    }

    // The run takes a second signal as a wish to stop without saving, so that the first button works once.
    async function stop({ target }) {
      target.disabled = true;
      await post("/api/runs/stop", { folder }).then(() => { stopping = true; }, (problem) => tell(error, problem));
      drawn = "";
      turn();
    }

    async function resume(run) {
      try {
        const argv = Object.entries(run.flags).filter(([flag]) => flag !== "resume").flatMap(([flag, value]) =>
          value === true ? [`--${flag}`] : [`--${flag}`, ...(Array.isArray(value) ? value : [value]).map(String)]);
        const { id } = await post("/api/jobs", { words: ["train", ...argv, "--resume"] });
        location.hash = `#runs:job:${id}`;
      } catch (problem) {
        tell(error, problem);
      }
    }

    shown = { again: turn };
    repeat(signal, 2, turn);
  }
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

// A command that the page started: its words, its output as it comes, how it ended; -> the part with its output.
// stops() tells whether it offers to stop the command, which a run does itself once it has begun; done() is called if it
// ended well.
export function showJob(place, id, signal, stops = () => true, done = () => {}) {
  const title = el("h2", {}, t("job.name", id)), line = el("pre"), output = el("pre", { tabIndex: 0, "aria-label": t("job.output") }), folded = el("details", { open: true }, el("summary", {}, t("job.output")), output);
  const state = el("div"), notes = el("div"), wrong = el("div"), buttons = el("div", { className: "row" });
  place.append(el("div", { className: "job" }, title, line, state, notes, wrong, buttons, folded));
  const leave = new AbortController();
  let next = 0, stopping = false;
  const stop = ({ target }) => {
    target.disabled = stopping = true;
    post(`/api/jobs/${id}/stop`).catch((problem) => tell(wrong, problem));
  };
  repeat(AbortSignal.any([signal, leave.signal]), 1, async () => {
    let job;
    try {
      job = await get(`/api/jobs/${id}`, { begin: next });
    } catch (problem) {
      tell(wrong, problem);
      leave.abort();
      return;
    }
    next = job.next ?? next;
    const low = output.scrollHeight - output.scrollTop - output.clientHeight < 30;
    output.append(job.output ?? "");
    if (low) output.scrollTop = output.scrollHeight;
    line.textContent = words(job.words);
    state.replaceChildren(badge(job));
    buttons.replaceChildren(job.state === "running" && stops() ? el("button", { type: "button", disabled: stopping, onclick: stop }, t("stop")) : "");
    if (job.state === "running") return;
    leave.abort();
    if (job.code === 0) done();
    if (failed(job) && job.words[0] === "train") buttons.append(el("a", { className: "button", href: "#train" }, t("job.back")));
    notes.replaceChildren(...[...output.textContent.matchAll(/^note: .*$/gm)].map(([line]) => el("p", { className: "note" }, line)));
    if (failed(job)) tell(wrong, job.state === "lost" ? t("job.lost") : lastWords(output.textContent, job.code));
  });
  return folded;
}

function lastWords(text, code) {
  const at = text.lastIndexOf("error: ");
  if (code === KILLED) return t("job.killed");
  return at >= 0 ? text.slice(at).trim() : t("job.failed", code);
}

const KILLED = 137;
const STOPPED = [130, 143]; // exit codes of a command that Ctrl-C or SIGTERM ended in order
const failed = (job) => job.state === "lost" || (job.state === "ended" && job.code !== 0 && !STOPPED.includes(job.code));

function badge(job) {
  const ended = job.code === 0 ? t("state.done") : failed(job) ? t("state.failed", job.code) : t("state.stopped");
  return el("span", { className: `state ${job.state === "running" ? "running" : failed(job) ? "failed" : ""}` }, job.state === "ended" ? ended : t(`state.${job.state}`));
}

const valueOf = (command, flag) => command[command.indexOf(flag) + 1];
const folderOf = (command) => (command.includes("--proj_dir") ? valueOf(command, "--proj_dir") : "out");
const target = (command) => (command[0] === "train" ? folderOf(command) : command.includes("--output") ? valueOf(command, "--output") : "");
