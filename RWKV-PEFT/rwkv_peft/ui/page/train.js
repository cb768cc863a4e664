// Train: the flags of train.py as a form, the command that they make, and the memory that it takes.
import { copyButton, el, pathField, post, recall, remember, tell, words } from "./lib.js";

const ENDINGS = { load_model: [".pth"] };
const NAMES = {
  load_model: "Base model", data_file: "Data", data_type: "Rows are", proj_dir: "Folder of the run", tokenizer: "Tokenizer",
  peft: "Method", bone_r: "Rank", ctx_len: "Longest row, tokens", micro_bsz: "Rows a step", epoch_count: "Epochs",
  lr_init: "Learning rate", val_split: "Share held out", precision: "Precision", merge_on_save: "Merge when saved",
};

export async function trainPage(place, about, signal) {
  const state = recall("train", {});
  const started = { data_type: "sft", val_split: "0.1", merge_on_save: "on", proj_dir: "out/mine" };
  for (const [flag, value] of Object.entries(started)) state[flag] ??= value;
  const fields = new Map(), known = new Map();
  const command = el("pre", { id: "command", tabIndex: 0 }), plan = el("pre", { id: "plan", tabIndex: 0 }), error = el("div");
  const start = el("button", { className: "main", type: "button", onclick: begin }, "Start");
  const [first, ...others] = about.form;
  const form = el("form", { onsubmit: (event) => { event.preventDefault(); begin(); } },
    el("div", { className: "fields" }, first.fields.map(field)),
    el("h2", {}, "All other settings"),
    others.map((group) => el("details", {}, el("summary", {}, group.title), el("div", { className: "fields" }, group.fields.map(field)))));
  place.append(el("h1", {}, "Train"), el("p", { className: "lead" },
    "Fields that are left empty take the default in grey. Memory and mistakes are shown as you type."),
  el("div", { className: "columns" }, form, el("div", {}, error,
    el("h2", {}, "The command"), command, el("div", { className: "row" }, start, copyButton(() => command.textContent),
      el("button", { type: "button", onclick: reset }, "Clear all")),
    el("h2", {}, "Memory and disk"), plan)));

  function field(made) {
    const { flag, kind, values, help, required } = made, value = state[flag] ?? "";
    const label = NAMES[flag] ?? flag, id = `flag-${flag}`;
    known.set(flag, made);
    let box, input;
    if (kind === "path") {
      ({ box, input } = pathField(id, label, { value, endings: ENDINGS[flag] ?? [], folders: flag === "proj_dir" || flag === "data_file", help }));
      input.placeholder = made.default;
    } else {
      if (kind === "on") input = el("input", { id, type: "checkbox", checked: value === "on" });
      else if (kind === "choice" || kind === "switch") {
        input = el("select", { id }, el("option", { value: "" }, made.default ? `default: ${made.default}` : "default"),
          values.map((one) => el("option", { value: one, selected: one === value }, one)));
      } else input = el("input", { id, value, placeholder: made.default, spellcheck: false, autocomplete: "off" });
      box = el("div", {}, el("label", { htmlFor: id }, label), input, el("p", { className: "help" }, help));
    }
    input.title = `--${flag}`;
    if (required) input.required = true;
    input.addEventListener("input", () => {
      const given = kind === "on" ? (input.checked ? "on" : "") : input.value.trim();
      state[flag] = given;
      remember("train", state);
      changed();
    });
    fields.set(flag, box);
    return box;
  }

  function argv() {
    const found = [];
    for (const [flag, { kind }] of known) {
      const value = state[flag] ?? "";
      if (value === "") continue;
      if (kind === "on") found.push(`--${flag}`);
      else if (kind === "list") found.push(`--${flag}`, ...value.split(/\s+/));
      else found.push(`--${flag}`, value);
    }
    return found;
  }

  let waiting = null, latest = 0;
  function changed() {
    command.textContent = words(["train", ...argv()]);
    clearTimeout(waiting);
    waiting = setTimeout(judge, 600);
  }

  async function judge() {
    const turn = (latest += 1);
    plan.textContent = "counting …";
    try {
      const found = await post("/api/plan", { words: argv() });
      if (turn !== latest || signal.aborted) return;
      const refused = found.code === 2;
      mark(refused ? found.text : "");
      plan.textContent = refused ? "" : found.text;
      tell(error, refused ? found.text.trim() : null);
    } catch (problem) {
      if (turn === latest) { plan.textContent = ""; tell(error, problem); }
    }
  }

  // Marks the fields that a message names.
  function mark(message) {
    const named = new Set([...message.matchAll(/--(\w+)/g)].map((found) => found[1]));
    for (const [flag, box] of fields) box.classList.toggle("wrong", named.has(flag));
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
    remember("train", {});
    dispatchEvent(new Event("hashchange"));
  }

  changed();
}
