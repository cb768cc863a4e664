// Train: the flags of train.py as a form, the command that they make, and the memory and time that it takes.
import { copyButton, duration, el, figure, flagField, get, listed, number, post, recall, remember, tell, words } from "./lib.js";

const ENDINGS = { load_model: [".pth"] };
const NAMES = {
  load_model: "Base model", data_file: "Data", data_type: "Rows are", proj_dir: "Folder of the run", tokenizer: "Tokenizer",
  objective: "Objective", peft: "Method", bone_r: "Rank", ctx_len: "Longest row, tokens", micro_bsz: "Rows a step",
  epoch_count: "Epochs", optim: "Optimizer", lr_init: "Learning rate", val_split: "Share held out", precision: "Precision",
  merge_on_save: "Merge when saved",
};
const STARTED = { data_type: "sft", val_split: "0.1", merge_on_save: "on", proj_dir: "out/mine" };

export async function trainPage(place, about, signal) {
  const state = { ...STARTED, ...recall("train", {}) };
  state.proj_dir = unused(state.proj_dir, (await get("/api/runs").catch(() => [])).map((run) => run.folder));
  const fields = new Map(), known = new Map();
  const command = el("pre", { id: "command", tabIndex: 0 }), plan = el("div", { id: "plan", "aria-live": "polite" }), error = el("div");
  const start = el("button", { className: "main", type: "button", onclick: begin }, "Start");
  const [first, ...others] = about.form;
  const find = el("input", { type: "search", placeholder: "find a setting, such as warm-up or wandb", "aria-label": "find a setting", oninput: search });
  const groups = others.map((group) => el("details", {}, el("summary", {}, group.title), el("div", { className: "fields" }, group.fields.map(field))));
  const form = el("form", { onsubmit: (event) => { event.preventDefault(); begin(); } },
    el("div", { className: "fields" }, first.fields.map(field)));
  place.append(el("h1", {}, "Train"), el("p", { className: "lead" },
    "Name a base model (docs/start/models.md says which there are, and how to download one) and data; fields that are left empty take the default in grey. Memory, time and mistakes are shown as you type."),
  el("div", { className: "columns" }, form, el("div", { className: "stays" }, error,
    el("h2", {}, "The command"), command, el("div", { className: "row" }, start, copyButton(() => command.textContent),
      el("button", { type: "button", onclick: reset }, "Clear all")),
    el("h2", {}, "Memory, time and disk"), plan), el("div", {}, el("h2", {}, "All other settings"), find, groups)));

  function field(made) {
    const { flag } = made;
    known.set(flag, made);
    fields.set(flag, flagField(made, NAMES[flag] ?? flag, state[flag] ?? "", (given) => {
      state[flag] = given;
      remember("train", state);
      changed();
    }, ENDINGS[flag]));
    return fields.get(flag);
  }

  // Shows only the settings whose names or help have the word, in open groups.
  function search() {
    const word = find.value.trim().toLowerCase().replaceAll(" ", "_");
    for (const [n, group] of groups.entries()) {
      const hits = others[n].fields.filter(({ flag, help, words: told }) => {
        const hit = flag.includes(word) || [help, ...Object.values(told)].join(" ").toLowerCase().includes(find.value.trim().toLowerCase());
        fields.get(flag).hidden = !hit;
        return hit;
      });
      group.hidden = !hits.length;
      group.open = Boolean(word) && hits.length > 0;
    }
  }

  function argv() {
    const found = [];
    for (const [flag, { kind }] of known) {
      const value = state[flag] ?? "";
      if (value === "") continue;
      if (kind === "on") found.push(`--${flag}`);
      else if (kind === "list" || kind === "paths") found.push(`--${flag}`, ...listed(value));
      else found.push(`--${flag}`, value);
    }
    return found;
  }

  let waiting = null, busy = false, stale = false;
  function changed() {
    command.textContent = words(["train", ...argv()]);
    clearTimeout(waiting);
    waiting = setTimeout(judge, 600);
  }

  // Plans what the form says, one plan at a time: each is a process of some seconds.
  async function judge() {
    stale = busy;
    if (busy || signal.aborted) return;
    const note = (text) => plan.replaceChildren(el("p", { className: "note" }, text));
    if (!state.data_file || !(state.load_model || state.n_layer)) return note("is shown when a base model and data are named");
    note("counting …");
    busy = true;
    const found = await post("/api/plan", { words: argv() }).catch((problem) => ({ problem }));
    busy = false;
    if (stale || signal.aborted) return judge();
    const refusal = found.code === 2 ? found.text.trim() : "";
    mark(refusal);
    tell(error, found.problem ?? refusal);
    if (found.problem || refusal) note("is shown when the flags go together"); else showPlan(found);
  }

  // The peak of each device and the time first, then what `rwkv-peft plan` prints.
  function showPlan({ text, time }) {
    const peaks = [...text.matchAll(/^(GPU|main memory)( of [\d.,]+ \w+)?.*\n(?: {2}.*\n)*? {2}peak +([\d.,]+ \w+)(.*)$/gm)];
    plan.replaceChildren(el("div", { className: "figures" }, peaks.map(([, device, whole, peak, verdict]) =>
      figure(`${device}${whole ?? ""}${verdict}`, peak)), time ? figure(`about, for ${number(time.steps)} steps`, duration(time.seconds)) : ""),
    el("p", { className: "note" }, time ? `The time is that of the steps of ${time.run}, which had the same settings and data; reading the model, validation and saving take some more.`
      : "No run here has had these settings and this data yet, so that its time is not known: Runs shows the time left once 5 steps are done."), el("details", { open: !peaks.length }, el("summary", {}, "Part by part"), el("pre", { tabIndex: 0 }, text)));
  }

  // Marks the fields that a message names, and opens their groups.
  function mark(message) {
    const named = new Set([...message.matchAll(/--(\w+)/g)].map((found) => found[1]));
    for (const [flag, box] of fields) {
      box.classList.toggle("wrong", named.has(flag));
      if (named.has(flag) && box.closest("details")) box.closest("details").open = true;
    }
  }

  async function begin() {
    start.disabled = true;
    tell(error, null);
    try {
      const { id } = await post("/api/jobs", { words: ["train", ...argv()] });
      location.hash = `#runs:job:${id}`;
    } catch (problem) {
      tell(error, problem);
      start.disabled = false;
    }
  }

  function reset() {
    if (!confirm("Empty all fields of this page?")) return;
    remember("train", {});
    dispatchEvent(new Event("hashchange"));
  }

  changed();
}

// A folder's name, with a number behind it if it holds a run already.
function unused(folder, taken) {
  let name = folder;
  for (let n = 2; taken.includes(name); n += 1) name = `${folder.replace(/-\d+$/, "")}-${n}`;
  return name;
}
