// Train: what is trained on what, how often; the command, and the memory and time that it takes; behind it all flags. A
// run that was started here stays on this page, above the settings of the next one.
import { address, copyButton, duration, el, figure, flagField, folded, get, listed, named, number, post, remember, settings, size as bytes, tell, words } from "./lib.js";
import { live, showRun } from "./run.js";
import { labelOf, t } from "./texts.js";

const ENDINGS = { load_model: [".pth"], data_file: [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"] };
const STARTED = { data_type: "sft", val_split: "0.1", proj_dir: "out/mine" };
const ASKED = ["proj_dir", "epoch_count"]; // the others are under More
const STEPS = { load_model: "base", data_file: "data" }; // chosen in steps of their own

export async function trainPage(place, about, signal, asked) {
  const runs = await get("/api/runs").catch(() => []), shown = asked || runs.find(live)?.folder;
  const state = { ...STARTED, ...settings() };
  state.proj_dir = unused(state.proj_dir, runs.filter((run) => run.files.length || live(run)).map((run) => run.folder));
  const fields = new Map(), known = new Map(about.form.flatMap((group) => group.fields).map((made) => [made.flag, made]));
  const command = el("pre", { id: "command", tabIndex: 0 }), plan = el("div", { id: "plan", "aria-live": "polite" }), error = el("div");
  const checking = el("p", { className: "note", role: "status", hidden: true }, t("plan.checking"));
  const start = el("button", { className: "main", type: "button", onclick: begin }, t("train.start"));
  const find = el("input", { type: "search", placeholder: t("train.find"), "aria-label": t("train.find"), oninput: search });
  const missing = el("p", { className: "note", hidden: true }, t("train.not found")), taken = el("dl", { className: "taken" });
  const form = el("form", { className: "fields", onsubmit: (event) => { event.preventDefault(); begin(); } }, ASKED.map((flag) => field(known.get(flag))));
  const made = about.form.map((group) => group.fields.filter(({ flag }) => !ASKED.includes(flag)));
  const groups = made.map((group, n) => folded(t(n ? `group.${about.form[n].title}` : "train.first"), el("div", { className: "fields" }, group.map(field))));
  groups[0].open = true;
  const more = folded(t("train.more"), find, missing, groups, el("div", { className: "row" }, el("button", { type: "button", onclick: reset }, t("train.reset"))));
  const settingsOf = [el("div", { className: "columns" },
    el("div", {}, taken, form),
    el("div", { className: "stays" }, error, el("div", { className: "row" }, start), el("h2", {}, t("plan.title")), plan, checking,
      folded(t("train.command"), command, copyButton(() => command.textContent))),
    more)];
  const other = folded(t("train.other"), ...(shown ? settingsOf : [])), view = el("div");
  place.append(el("h1", {}, t("nav.train")), ...(shown ? [view, other] : [el("p", { className: "lead" }, t("train.lead")), ...settingsOf]));
  if (shown) {
    other.addEventListener("toggle", changed);
    showRun(view, shown, signal, { changed: (how) => { other.open ||= how === "failed"; } });
  }

  function field(one) {
    const { flag } = one;
    fields.set(flag, flagField(one, labelOf(flag), state[flag] ?? "", (given) => {
      state[flag] = given;
      remember("train", state);
      changed();
    }, ENDINGS[flag]));
    return fields.get(flag);
  }

  // Shows only the settings of which something has each word, in open groups.
  function search() {
    const asked = plain(find.value).split(" "), any = Boolean(find.value.trim());
    const has = ({ flag, help, search: other = "", words: told }) => {
      const text = plain([flag, labelOf(flag), help, other, ...Object.values(told)].join(" "));
      return asked.every((word) => text.includes(word));
    };
    for (const [n, group] of groups.entries()) {
      const found = made[n].filter(({ flag }, m) => !(fields.get(flag).hidden = !has(made[n][m])));
      group.hidden = !found.length;
      group.open = any ? found.length > 0 : n === 0;
    }
    missing.hidden = groups.some((group) => !group.hidden);
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

  let waiting = null, turn = 0, planned = 0; // planned: the turn whose plan is shown
  function changed() {
    command.textContent = words(["train", ...argv()]);
    taken.replaceChildren(...Object.entries(STEPS).flatMap(([flag, step]) => [el("dt", {}, labelOf(flag)),
      el("dd", {}, state[flag] || "–", " ", el("a", { href: `#${step}` }, t(state[flag] ? "train.change" : "train.choose")))]));
    fields.get("bone_r").querySelector("input").disabled = state.peft === "none";
    clearTimeout(waiting);
    waiting = setTimeout(judge, 600);
  }

  // Plans what the form says, in a moment; what goes together is then checked.
  async function judge() {
    const mine = (turn += 1), note = (text) => plan.replaceChildren(el("p", { className: "note" }, text));
    planned = 0;
    if (signal.aborted || (shown && !other.open)) return;
    if (!state.data_file || !(state.load_model || state.n_layer)) return note(t("plan.needs"));
    if (!plan.querySelector(".figures")) note(t("plan.counting"));
    const found = await post("/api/plan", { words: argv() }).catch((problem) => ({ problem }));
    if (mine !== turn) return;
    if (found.problem || found.code === 2) {
      note(t("plan.refused"));
      return refuse(found);
    }
    refuse({});
    showPlan(found);
    planned = mine;
    if (checking.hidden) check();
  }

  // Checks the form as Start does, in a process of some seconds: one at a time, and again if the form has changed since.
  async function check() {
    checking.hidden = false;
    for (let mine; planned && planned !== mine && !signal.aborted;) {
      mine = planned;
      const found = await post("/api/check", { words: argv() }).catch((problem) => ({ problem }));
      if (mine === turn) refuse(found);
    }
    checking.hidden = true;
  }

  function refuse({ problem, code, text }) {
    const refusal = code === 2 ? text.trim() : "";
    mark(refusal);
    tell(error, problem ?? refusal);
  }

  // The peak of each device and the time first, then what `rwkv-peft plan` prints.
  function showPlan({ text, time }) {
    const merged = /^ {2}merged.* ([\d.,]+ \w+) x (\d+)$/m.exec(text), disk = /^disk +([\d.,]+ \w+) in (.*)$/m.exec(text);
    const peaks = [...text.matchAll(/^(GPU|main memory)(?: of ([\d.,]+ \w+))?.*\n(?: {2}.*\n)*? {2}peak +([\d.,]+ \w+)(, fits|, does not fit)?/gm)];
    const verdict = (found) => (found ? t(found === ", fits" ? "plan.fits" : "plan.too large") : "");
    plan.replaceChildren(el("div", { className: "figures" }, peaks.map(([, device, whole, peak, found]) =>
      figure(t(`plan.${device}`, whole ? t("plan.of", decimal(whole)) : "") + verdict(found), decimal(peak), found === ", does not fit")), disk ? figure(t("plan.disk"), decimal(disk[1])) : "",
    time ? figure(t("plan.time", number(time.steps)), duration(time.seconds)) : ""),
    el("p", { className: "note" }, time ? t("plan.time.note", time.run) : t("plan.time.unknown")),
    merged?.[2] > 1 ? el("p", { className: "note" }, t("plan.merged", named("merge_on_save"), merged[2], decimal(merged[1])), " ",
      state.epoch_save === "0" ? "" : el("button", { type: "button", onclick: () => set("epoch_save", "0") }, t("plan.merged.end"))) : "",
    folded(t("plan.parts"), el("pre", { tabIndex: 0 }, text)));
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
      for (let around = box.closest("details"); named.has(flag) && around; around = around.parentElement.closest("details")) around.open = true;
    }
  }

  async function begin() {
    start.disabled = true;
    tell(error, null);
    try {
      await post("/api/jobs", { words: ["train", ...argv()] });
      const run = address("train", state.proj_dir || "out");
      if (location.hash === run) dispatchEvent(new Event("hashchange")); else location.hash = run; // after a run that was refused it stands there
    } catch (problem) {
      tell(error, problem);
      start.disabled = false;
    }
  }

  function reset() {
    if (!confirm(t("train.reset.sure"))) return;
    remember("train", {});
    dispatchEvent(new Event("hashchange"));
  }

  changed();
}

// "1.50 GiB", as plan counts, in the units of a box: "1.6 GB".
const decimal = (text) => {
  const [count, unit] = text.split(" ");
  return bytes(Number(count.replaceAll(",", "")) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].indexOf(unit));
};

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
