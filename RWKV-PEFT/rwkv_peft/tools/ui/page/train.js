// Train: the flags of train.py as a form, the command that they make, and the memory and time that it takes.
import { copyButton, duration, el, figure, flagField, get, listed, named, NAMES, number, post, recall, remember, tell, words } from "./lib.js";

const ENDINGS = { load_model: [".pth"] };
const STARTED = { data_type: "sft", val_split: "0.1", merge_on_save: "on", proj_dir: "out/mine" };

export async function trainPage(place, about, signal) {
  const state = { ...STARTED, ...recall("train", {}) };
  state.proj_dir = unused(state.proj_dir, (await get("/api/runs").catch(() => [])).map((run) => run.folder));
  const fields = new Map(), known = new Map(about.form.flatMap((group) => group.fields).map((made) => [made.flag, made]));
  const command = el("pre", { id: "command", tabIndex: 0 }), plan = el("div", { id: "plan", "aria-live": "polite" }), error = el("div");
  const start = el("button", { className: "main", type: "button", onclick: begin }, "Start");
  const [first, ...others] = about.form;
  const find = el("input", { type: "search", placeholder: "find a setting, such as batch size or wandb", "aria-label": "find a setting", oninput: search });
  const hits = el("div", { className: "row", hidden: true });
  const groups = others.map((group) => el("details", {}, el("summary", {}, group.title), el("div", { className: "fields" }, group.fields.map(field))));
  const form = el("form", { onsubmit: (event) => { event.preventDefault(); begin(); } },
    el("div", { className: "fields" }, first.fields.map(field)));
  place.append(el("h1", {}, "Train"), el("p", { className: "lead" },
    "Name a base model (docs/start/models.md says which there are, and how to download one) and data; fields that are left empty take the default in grey. Memory, time and mistakes are shown as you type."),
  el("div", { className: "columns" }, form, el("div", { className: "stays" }, error,
    el("h2", {}, "The command"), command, el("div", { className: "row" }, start, copyButton(() => command.textContent),
      el("button", { type: "button", onclick: reset }, "Clear all")),
    el("h2", {}, "Memory, time and disk"), plan), el("div", {}, el("h2", {}, "All other settings"), find, hits, groups)));

  function field(made) {
    const { flag } = made;
    fields.set(flag, flagField(made, NAMES[flag] ?? flag, state[flag] ?? "", (given) => {
      state[flag] = given;
      remember("train", state);
      changed();
    }, ENDINGS[flag]));
    return fields.get(flag);
  }

  // Shows only the settings of which something has each word, in open groups, and the way to those above them.
  function search() {
    const asked = plain(find.value).split(" "), any = Boolean(find.value.trim());
    const has = ({ flag, help, search: other = "", words: told }) => {
      const text = plain([flag, NAMES[flag], help, other, ...Object.values(told)].join(" "));
      return asked.every((word) => text.includes(word));
    };
    for (const [n, group] of groups.entries()) {
      const found = others[n].fields.filter((made) => !(fields.get(made.flag).hidden = !has(made)));
      group.hidden = !found.length;
      group.open = any && found.length > 0;
    }
    const above = any ? first.fields.filter(has) : [];
    hits.hidden = !any;
    hits.replaceChildren(...(above.length ? ["Above:"] : []), ...above.map(({ flag }) =>
      el("button", { type: "button", onclick: () => fields.get(flag).querySelector("input, select").focus() }, NAMES[flag])),
    above.length || groups.some((group) => !group.hidden) ? "" : "no setting has all of these words");
  }

  // The words of the command. A rank goes to the method that is chosen; Bone has a flag of its own for it.
  function argv() {
    const given = { ...state };
    if (given.bone_r && given.peft && given.peft !== "bone") {
      if (given.peft !== "none") given.peft_config = withRank(given.peft_config, given.bone_r);
      given.bone_r = "";
    }
    const found = [];
    for (const [flag, { kind }] of known) {
      const value = given[flag] ?? "";
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
    fields.get("bone_r").querySelector("input").disabled = state.peft === "none";
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
    const merged = /^ {2}merged.* ([\d.,]+ \w+) x (\d+)$/m.exec(text), disk = /^disk +([\d.,]+ \w+) in (.*)$/m.exec(text);
    const peaks = [...text.matchAll(/^(GPU|main memory)( of [\d.,]+ \w+)?.*\n(?: {2}.*\n)*? {2}peak +([\d.,]+ \w+)(.*)$/gm)];
    plan.replaceChildren(el("div", { className: "figures" }, peaks.map(([, device, whole, peak, verdict]) =>
      figure(`${device}${whole ?? ""}${verdict}`, peak)), disk ? figure(`disk, in ${disk[2]}`, disk[1]) : "", time ? figure(`about, for ${number(time.steps)} steps`, duration(time.seconds)) : ""),
    el("p", { className: "note" }, time ? `The time is that of the steps of ${time.run}, which had the same settings and data; reading the model, validation and saving take some more.`
      : "No run here has had these settings and this data yet, so that its time is not known: Runs shows the time left once 5 steps are done."),
    merged?.[2] > 1 ? el("p", { className: "note" }, `${named("merge_on_save")} writes ${merged[2]} merged models of ${merged[1]}: one for each epoch that is saved, and the best. `,
      state.epoch_save === "0" ? "" : el("button", { type: "button", onclick: () => set("epoch_save", "0") }, "Save at the end only")) : "", el("details", { open: !peaks.length }, el("summary", {}, "Part by part"), el("pre", { tabIndex: 0 }, text)));
  }

  function set(flag, value) {
    const input = fields.get(flag).querySelector("input, select");
    input.value = value;
    input.dispatchEvent(new Event("input"));
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

const plain = (text) => text.toLowerCase().replaceAll(/[\s_-]+/g, " ").trim();

// The settings of a method as JSON, with a rank; what is no JSON stays, and is refused.
function withRank(config, rank) {
  try {
    return JSON.stringify({ ...JSON.parse(config || "{}"), r: Number(rank) });
  } catch {
    return config;
  }
}

// A folder's name, with a number behind it if it holds a run already.
function unused(folder, taken) {
  let name = folder;
  for (let n = 2; taken.includes(name); n += 1) name = `${folder.replace(/-\d+$/, "")}-${n}`;
  return name;
}
