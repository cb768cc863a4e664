// Runs: those below the folder, live; several in one picture.
import { chart, chartSettings } from "./chart.js";
import { address, download, duration, el, figure, get, number, post, recall, remember, renew, repeat, tell, words } from "./lib.js";

const HELD_OUT = { val_loss: "held-out loss", retain_loss: "loss of retained rows" };
const LOSSES = ["loss", "reward"];
const ORDERS = {
  "the newest first": (one, other) => other.modified - one.modified,
  "by name": (one, other) => one.folder.localeCompare(other.folder, "en", { numeric: true }),
};

export async function runsPage(place, about, signal, chosen) {
  const list = el("ul", { className: "list" }), jobs = el("ul", { className: "list" }), view = el("div");
  const find = el("input", { type: "search", placeholder: "find a run", "aria-label": "find a run", oninput: drawList });
  const order = el("select", { "aria-label": "order of runs", onchange: drawList }, Object.keys(ORDERS).map((name) => el("option", {}, name)));
  const which = el("div", { className: "row", hidden: true }, find, order);
  const more = el("button", { type: "button", onclick: () => { most = Infinity; drawList(); } });
  place.append(el("h1", {}, "Runs"), el("div", { className: "columns side" },
    el("div", {}, which, list, more, el("h2", {}, "Commands started here"), jobs), view));
  let most = LISTED;
  const compared = new Set(recall("compared", []));
  let runs = [], commands = [], shown = null;
  const job = chosen.startsWith("job:") ? chosen.slice(4) : "";
  const leave = new AbortController();
  signal.addEventListener("abort", () => leave.abort());

  await repeat(signal, 3, async () => {
    try {
      const [found, started] = await Promise.all([get("/api/runs"), get("/api/jobs")]);
      [runs, commands] = [found, started];
      drawList();
      renew(jobs, ...started.slice(0, 12).map((one) => el("li", {},
        el("a", { href: `#runs:job:${one.id}`, "aria-current": one.id === job ? "true" : null }, `${one.id}: ${one.words.slice(0, 1)} ${target(one.words)}`), badge(one))));
      if (!jobs.childElementCount) jobs.append(el("li", { className: "note" }, "none yet"));
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
    more.textContent = `Show all ${number(found.length)} runs`;
    renew(list, ...found.slice(0, most).map((run) => {
      const box = el("input", { type: "checkbox", checked: compared.has(run.folder), "aria-label": `compare ${run.folder}`, title: "draw into one picture" });
      box.addEventListener("change", () => {
        if (box.checked) compared.add(run.folder); else compared.delete(run.folder);
        remember("compared", [...compared]);
        shown?.again();
      });
      return el("li", {}, box, el("a", { href: address("runs", run.folder), "aria-current": run.folder === folder ? "true" : null }, run.folder),
        el("span", { className: `state ${run.running ? "running" : ""}` }, run.running ? "running" : ""));
    }));
    if (!runs.length) list.append(el("li", {}, el("span", { className: "note" }, "no run yet; ", el("a", { href: "#train" }, "start one"))));
    else if (!found.length) list.append(el("li", { className: "note" }, "no run is called so"));
    if (runs.length > 1) list.append(el("li", { className: "note" }, "Mark runs to draw their losses into one picture."));
  }

  function open(started) {
    const one = job ? started.find((found) => found.id === job) : null;
    const folder = job ? (one ? folderOf(one.words) : "") : chosen || runs[0]?.folder || "";
    shown = { again() {} };
    const shows = folder && (!job || one?.words[0] === "train");
    const output = job ? showJob(view, job, leave.signal, () => !shown.running) : null;
    if (shows) showRun(folder, output);
    if (chosen && matchMedia("(max-width: 850px)").matches) view.scrollIntoView(); // below the lists there
    if (!job && !folder) view.append(el("p", { className: "note" }, "Nothing to show yet."));
  }

  // output: that of the run's command, which is folded when the run has something to show; null for a run of others.
  function showRun(folder, output) {
    const place = el("div");
    view.append(place);
    const title = el("h2", {}, folder), figures = el("div", { className: "figures" }), bar = el("progress", { max: 1, value: 0, "aria-label": "steps" });
    const buttons = el("div", { className: "row" }), error = el("div"), losses = el("div"), rates = el("div"), answers = el("div"), files = el("p", { className: "note" });
    const settings = chartSettings(() => shown.again());
    const begins = el("p", { className: "note" }, "The run begins: it reads the model and the rows."), all = el("div", { hidden: true }, title, figures, bar, buttons, error, settings.box, losses, rates, answers, files);
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
      const stamp = JSON.stringify([lines.length, run.running, begun, [...compared].sort(), settings.of(), run.files]);
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
      figures.replaceChildren(figure("state", run.running ? "running" : total && done >= total ? "done" : begun ? "begins" : "stopped"),
        figure("step", total ? `${number(done)} of ${number(total)}` : number(done)), figure(name, number(last[name])),
        figure("held-out loss", number(held?.val_loss)), figure("learning rate", number(last.lr, 3)), figure("tokens/s", last.tokens_per_s ? number(Math.round(last.tokens_per_s)) : "–"),
        figure("time left", run.running && total ? (speeds.length < 4 ? "after 5 steps" : duration((total - done) * pace)) : "–"));
      bar.max = total || 1;
      bar.value = Math.min(done, total || 1);
      renew(buttons,
        run.running ? el("button", { type: "button", disabled: stopping, onclick: stop }, stopping ? "Stopping after this step …" : "Stop after this step") : "",
        run.running && stopping ? el("button", { type: "button", onclick: stop }, "Stop at once, without saving") : "",
        !run.running && !begun && total > done && Object.keys(run.flags).length ? el("button", { type: "button", className: "main", onclick: () => resume(run) }, "Resume") : "",
        run.files.some((file) => /\.(safetensors|pth)$/.test(file)) ? el("a", { className: "button", href: address("release", folder) }, "Release") : "",
        run.files.length ? el("a", { className: "button", href: address("chat", folder) }, "Chat") : "",
        command && !output ? el("a", { className: "button", href: `#runs:job:${command.id}` }, "What it printed") : "");
      files.replaceChildren("Files: ", ...[...run.files, "metrics.jsonl"].flatMap((name) => [download(`${folder}/${name}`, name), " "]));
      const others = [...compared].filter((one) => one !== folder);
      const many = others.length > 0; // each run then has a colour, else each line
      chart(losses, name, [folder, ...others].flatMap((one, n) => linesOf(n ? read.get(one) : lines, name).map((line, m) =>
        ({ ...line, colour: many ? n : m, label: many ? `${one}: ${line.label}` : line.label }))), settings.of());
      chart(rates, "learning rate", linesOf(lines, "lr").map((line) => ({ ...line, colour: 0 })));
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
    repeat(leave.signal, 2, turn);
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
  const names = name === "lr" ? ["lr"] : [name, ...Object.keys(HELD_OUT)];
  return names.map((one, n) => {
    const found = lines.filter((line) => typeof line[one] === "number");
    return { label: HELD_OUT[one] ?? one, x: found.map((line) => line.step), y: found.map((line) => line[one]), dash: n ? [6, 4] : undefined };
  }).filter((line) => line.x.length);
}

// Answers that a step drew, the newest or another of the last, with what they earned; and those to some rows before
// the first step and after the last.
function showAnswers(place, found) {
  const drawn = (found["answers.jsonl"] ?? []).filter((line) => typeof line.completion === "string");
  const rows = (found["rows.jsonl"] ?? []).slice(-SHOWN);
  const steps = [...new Set(drawn.map((line) => line.step))].reverse(), body = el("div");
  const chosen = Number(place.dataset.step ?? -1), step = steps.includes(chosen) ? chosen : steps[0];
  const select = el("select", { "aria-label": "step", onchange: () => {
    if (Number(select.value) === steps[0]) delete place.dataset.step; else place.dataset.step = select.value; // the newest stays the newest
    show(Number(select.value));
  } }, steps.map((one) => el("option", { value: one, selected: one === step }, `drawn at step ${number(one + 1)}`)));
  const show = (one) => body.replaceChildren(table(["prompt", "answer", "reward", "tokens"],
    drawn.filter((line) => line.step === one).slice(0, SHOWN).map((line) => [line.prompt, turnsOf(line), number(line.reward), number(line.length)])));
  if (steps.length) show(step);
  place.replaceChildren(el("h2", {}, "Answers"),
    ...(steps.length ? [el("div", { className: "row" }, select), body] : []),
    ...(rows.length ? [el("p", { className: "note" }, verdict(rows)), table(["prompt", "the row's answer", "before", "after"],
      rows.map((row) => [row.prompt, said(row.answer), said(row.before), said(row.after)]))] : []),
    steps.length || rows.length ? "" : el("p", { className: "note" }, "none yet: some rows are answered before the first step and after the last"));
}

// How many rows of each kind are answered as they stand, after training and before.
function verdict(rows) {
  const right = (of, when) => rows.filter((row) => row.of === of && row[when] && said(row[when]) === said(row.answer)).length;
  return [...new Set(rows.map((row) => row.of))].map((of) =>
    `${of} rows: ${right(of, "after")} of ${rows.filter((row) => row.of === of).length} are answered word for word after the last step, ${right(of, "before")} before the first`).join("\n");
}

const said = (one) => (one?.text ?? "").trim();

// The completion of an answer, or all turns of a conversation with tools.
function turnsOf(line) {
  if (!Array.isArray(line.turns)) return line.completion;
  return el("div", {}, ...line.turns.map((turn) => el("div", { className: "turn" }, el("b", {}, `${turn?.role}: `), `${turn?.content}`)));
}

function table(names, rows) {
  return el("div", { className: "scroll" }, el("table", {}, el("tr", {}, ...names.map((name) => el("th", {}, name))),
    ...rows.map((row) => el("tr", {}, row.map((text) => el("td", {}, el("div", {}, text instanceof Node ? text : String(text ?? "").trim())))))));
}

// A command that the page started: its words, its output as it comes, how it ended; -> the part with its output.
// stops() tells whether it offers to stop the command, which a run does itself once it has begun; done() is called if it
// ended well.
export function showJob(place, id, signal, stops = () => true, done = () => {}) {
  const title = el("h2", {}, `command ${id}`), line = el("pre"), output = el("pre", { tabIndex: 0, "aria-label": "output" }), folded = el("details", { open: true }, el("summary", {}, "What it printed"), output), state = el("div"), notes = el("div"), wrong = el("div"), buttons = el("div", { className: "row" });
  place.append(el("div", { className: "job" }, title, line, state, notes, wrong, buttons, folded));
  const leave = new AbortController();
  signal.addEventListener("abort", () => leave.abort());
  let next = 0, stopping = false;
  const stop = ({ target }) => {
    target.disabled = stopping = true;
    post(`/api/jobs/${id}/stop`).catch((problem) => tell(wrong, problem));
  };
  repeat(leave.signal, 1, async () => {
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
    buttons.replaceChildren(job.state === "running" && stops() ? el("button", { type: "button", disabled: stopping, onclick: stop }, "Stop") : "");
    if (job.state === "running") return;
    leave.abort();
    if (job.code === 0) done();
    if (failed(job) && job.words[0] === "train") buttons.append(el("a", { className: "button", href: "#train" }, "Back to the settings"));
    notes.replaceChildren(...[...output.textContent.matchAll(/^note: .*$/gm)].map(([line]) => el("p", { className: "note" }, line)));
    if (failed(job)) tell(wrong, job.state === "lost" ? "The command's process is gone; it was killed, or the machine was restarted. Under Runs, Resume goes on from its last checkpoint." : lastWords(output.textContent, job.code));
  });
  return folded;
}

function lastWords(text, code) {
  const at = text.lastIndexOf("error: ");
  if (code === KILLED) return "It was killed from outside, mostly because memory ran out; a run's Resume goes on from its last checkpoint.";
  return at >= 0 ? text.slice(at).trim() : `It ended with exit code ${code}; see its output.`;
}

const LISTED = 20; // runs
const SHOWN = 16; // answers
const KILLED = 137;
const STOPPED = [130, 143]; // exit codes of a command that Ctrl-C or SIGTERM ended in order
const failed = (job) => job.state === "lost" || (job.state === "ended" && job.code !== 0 && !STOPPED.includes(job.code));

function badge(job) {
  const ended = job.code === 0 ? "done" : failed(job) ? `failed (${job.code})` : "stopped";
  return el("span", { className: `state ${job.state === "running" ? "running" : failed(job) ? "failed" : ""}` }, job.state === "ended" ? ended : job.state);
}

const valueOf = (command, flag) => command[command.indexOf(flag) + 1];
const folderOf = (command) => (command.includes("--proj_dir") ? valueOf(command, "--proj_dir") : "out");
const target = (command) => (command[0] === "train" ? folderOf(command) : command.includes("--output") ? valueOf(command, "--output") : "");
