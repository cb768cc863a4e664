// Runs: those below the folder, live; several in one picture; the other commands that the page started.
import { badge, showJob } from "./job.js";
import { address, el, get, number, recall, remember, renew, repeat, tell } from "./lib.js";
import { live, showRun } from "./run.js";
import { t } from "./texts.js";

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
  const others = el("div", { hidden: true }, el("h2", {}, t("runs.commands")), jobs);
  place.append(el("h1", {}, t("nav.runs")), el("div", { className: "columns side" }, el("div", {}, which, list, more, others), view));
  let most = LISTED, runs = [], again = null;
  const compared = new Set(recall("compared", [])), job = chosen.startsWith("job:") ? chosen.slice(4) : "";

  await repeat(signal, 3, async () => {
    try {
      const [found, started] = await Promise.all([get("/api/runs"), get("/api/jobs")]), commands = started.filter((one) => one.words[0] !== "train");
      runs = found;
      drawList();
      renew(jobs, ...commands.slice(0, 12).map((one) => el("li", {},
        el("a", { href: `#runs:job:${one.id}`, "aria-current": one.id === job ? "true" : null }, `${one.words[0]} ${target(one.words)}`), badge(one))));
      others.hidden = !commands.length;
      if (again === null) open();
    } catch (problem) {
      tell(list, problem);
    }
  });

  function drawList() {
    const folder = job ? "" : chosen || runs[0]?.folder, asked = find.value.toLowerCase().split(/\s+/);
    const found = runs.filter((run) => asked.every((word) => run.folder.toLowerCase().includes(word))).sort(ORDERS[order.value]);
    which.hidden = runs.length < 2;
    more.hidden = found.length <= most;
    more.textContent = t("runs.all", number(found.length));
    renew(list, ...found.slice(0, most).map((run) => {
      const box = el("input", { type: "checkbox", checked: compared.has(run.folder), "aria-label": t("runs.compare", run.folder), title: t("runs.compare", run.folder) });
      box.addEventListener("change", () => {
        if (box.checked) compared.add(run.folder); else compared.delete(run.folder);
        remember("compared", [...compared]);
        again?.();
      });
      return el("li", {}, box, el("a", { href: address("runs", run.folder), "aria-current": run.folder === folder ? "true" : null }, run.folder),
        el("span", { className: `state ${live(run) ? "running" : run.state}` }, run.state === "done" ? "" : t(`state.${run.state}`)));
    }));
    if (!runs.length) list.append(el("li", {}, el("span", { className: "note" }, t("runs.none"), " ", el("a", { href: "#train" }, t("runs.start")))));
    else if (!found.length) list.append(el("li", { className: "note" }, t("runs.not found")));
    if (runs.length > 1) list.append(el("li", { className: "note" }, t("runs.mark")));
  }

  function open() {
    const folder = chosen || runs[0]?.folder || "";
    again = () => {};
    if (job) showJob(view, job, signal, { open: true });
    else if (folder) again = showRun(view, folder, signal, { compared: () => [...compared].sort() });
    else view.append(el("p", { className: "note" }, t("runs.nothing")));
  }
}

const target = (command) => (command.includes("--output") ? command[command.indexOf("--output") + 1] : command[0] === "convert" ? command[2] : "");
