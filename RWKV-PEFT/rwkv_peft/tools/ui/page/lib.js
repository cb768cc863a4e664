// What all pages share: elements, requests, files, fields. Text from files is put in as text, never as HTML.

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "list") node[name] = value;
    else if (value !== null) node.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

async function answer(response) {
  const text = await response.text();
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Error(text || `the server answered ${response.status}`);
  }
  if (!response.ok) throw new Error(found.error?.message ?? found.error ?? text);
  return found;
}

const gone = () => { throw new Error("the page's server does not answer; is rwkv-peft ui still running?"); };

export async function get(path, query = {}) {
  return answer(await fetch(`${path}?${new URLSearchParams(query)}`).catch(gone));
}

export function send(path, body, signal = null) {
  const headers = { "Content-Type": "application/json" };
  return fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal }).catch(gone);
}

export async function post(path, body = {}) {
  return answer(await send(path, body));
}

// The address of a page about a run's folder, whatever its name holds.
export const address = (page, folder) => `#${page}:${encodeURIComponent(folder)}`;

export const download = (file, name) => el("a", { href: `/api/download?${new URLSearchParams({ path: file })}`, download: "" }, name);

// Shows an error where it belongs: in `place`, which a screen reader then reads.
export function tell(place, error) {
  place.replaceChildren(error ? el("div", { className: "error", role: "alert" }, error.message ?? String(error)) : "");
}

// Puts other children into a place; the focus stays on the one that is named alike.
export function renew(place, ...children) {
  const nameOf = (node) => node.ariaLabel || node.textContent || node.id;
  const focused = place.contains(document.activeElement) ? document.activeElement : null;
  place.replaceChildren(...children);
  if (focused) [...place.querySelectorAll(focused.tagName)].find((node) => nameOf(node) === nameOf(focused))?.focus({ preventScroll: true });
}

// Calls `act` now and every `seconds` until its page is left, one call at a time.
export function repeat(signal, seconds, act) {
  const turn = async () => {
    if (signal.aborted) return;
    await act();
    if (!signal.aborted) setTimeout(turn, 1000 * seconds);
  };
  return turn();
}

export const words = (command) => ["rwkv-peft", ...command].map(quoted).join(" ");
const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`);

export function duration(seconds) {
  const s = Math.round(seconds), h = Math.floor(s / 3600), m = Math.floor((s % 3600) / 60);
  return h ? `${h} h ${m} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
}

export const number = (value, digits = 4) =>
  typeof value !== "number" ? "–" : Number.isInteger(value) ? value.toLocaleString("en") : Number(value.toPrecision(digits)).toString();

export function figure(name, value, warns = false) {
  return el("div", { className: `figure ${warns ? "warns" : ""}` }, el("b", {}, String(value)), el("span", {}, name));
}

export function copyButton(text, label = "Copy") {
  const button = el("button", { type: "button" }, label);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text());
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = label; }, 1500);
  });
  return button;
}

// Takes a file of this computer into the folder, in parts that the server takes; shows how far it is in `place`. -> its name.
async function upload(file, place) {
  for (let begin = 0; ;) {
    const part = file.slice(begin, begin + PART);
    place.textContent = `${file.name}: ${size(begin)} of ${size(file.size)} …`;
    const query = new URLSearchParams({ name: file.name, begin, size: file.size });
    const body = await part.arrayBuffer().catch(() => { throw new Error(`the browser cannot read ${file.name}; choose a file, and no folder`); });
    const { name } = await answer(await fetch(`/api/files?${query}`, { method: "POST", body }).catch(gone));
    begin += part.size;
    if (!name) continue;
    place.textContent = `${name} is in the folder now`;
    return name;
  }
}
const PART = 8 << 20; // bytes

// Several names in one field are set apart by spaces; one that has spaces stands in quotes.
export const listed = (text) => (text.match(/"[^"]*"|\S+/g) ?? []).map((word) => word.replace(/^"(.*)"$/, "$1"));
export const asListed = (name) => (/\s/.test(name) ? `"${name}"` : name);

// Help below a field, which a screen reader reads with it. A long one shows its beginning until it is opened.
export function helpLine(input, text) {
  const line = text.length > LONG ? el("details", { className: "help" }, el("summary", {}, el("span", {}, text))) : el("p", { className: "help" }, text);
  line.id = `${input.id}-help`;
  input.setAttribute("aria-describedby", line.id);
  return line;
}
const LONG = 70; // characters: two lines of a narrow field

// A labelled field for a file below the root, with a button that looks for it.
export function pathField(name, label, { value = "", help = "", folders = false, endings = [], several = false } = {}) {
  const input = el("input", { id: name, name, value, spellcheck: false, autocomplete: "off" });
  const browse = el("button", { type: "button", title: `look for ${label}`, "aria-label": `look for ${label}` }, "…");
  const take = (found) => {
    input.value = several ? asListed(found) : found;
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  browse.addEventListener("click", async () => {
    const found = await choose(label, several ? listed(input.value)[0] ?? "" : input.value, folders, endings);
    if (found !== null) take(found);
  });
  const came = el("p", { className: "note", role: "status", hidden: true });
  const box = el("div", { className: "file" }, el("label", { htmlFor: name }, label), el("div", { className: "path" }, input, browse),
    came, help ? helpLine(input, help) : null);
  box.endings = endings;
  box.put = (file) => {
    came.hidden = false;
    return upload(file, came).then(take, (problem) => tell(came, problem));
  };
  return { box, input };
}

// Takes files that are dropped anywhere on a page: on a field for it, else for the first field of files that end so, else
// for the first of any files. A browser would open them in place of the page.
export function takeDrops(place) {
  const fields = () => [...place.querySelectorAll(".file")].filter((box) => box.offsetParent);
  const ends = ({ name }) => (box) => box.endings.some((end) => name.endsWith(end));
  addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    if (!fields().length) event.dataTransfer.dropEffect = "none";
  });
  addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (!file) return;
    event.preventDefault();
    const found = fields();
    (event.target.closest(".file") ?? found.find(ends(file)) ?? found.find((box) => !box.endings.length) ?? found[0])?.put(file);
  });
}

// A choice between what trained last in a run and what held best for other rows, if the run has both; told(file) hears of
// the one that is to be taken and of each other choice. -> {box, show, choose}; show(folder) fills the box -> the files.
export function adapterChoice(told) {
  const box = el("div", { hidden: true });
  async function show(folder) {
    box.hidden = true;
    const found = folder ? await get("/api/runs/taken", { folder }).catch(() => null) : null;
    if (!found) return [];
    const files = [found.file, found.other].filter(Boolean);
    const named = (file) => `${file.split("/").at(-1)}: ${/-best\.\w+$/.test(file) ? "the lowest loss of held-out rows" : "trained last"}`;
    const select = el("select", { id: "which", onchange: () => told(select.value) },
      files.map((file) => el("option", { value: file }, named(file))));
    box.replaceChildren(el("label", { htmlFor: "which" }, "Of this run"), select, helpLine(select, found.note || "the last holds as well for other rows as any before"));
    box.hidden = !found.other;
    told(found.file);
    return files;
  }
  function choose(file) {
    box.querySelector("select").value = file;
    told(file);
  }
  return { box, show, choose };
}

// What the page calls flags that a person meets first, and what it says of them in place of the flag's help.
export const NAMES = {
  load_model: "Base model", data_file: "Data", data_type: "Rows are", proj_dir: "Folder of the run", tokenizer: "Tokenizer",
  objective: "Objective", peft: "Method", bone_r: "Rank", ctx_len: "Longest row, tokens", micro_bsz: "Rows a step",
  epoch_count: "Epochs", optim: "Optimizer", lr_init: "Learning rate", val_split: "Share held out", precision: "Precision",
  merge_on_save: "Merge when saved", sft_field: "Columns",
};
const HELP = {
  load_model: "a .pth, which has the model's dimensions",
  data_file: "a file or folder of rows (.jsonl, .json, .csv, .parquet, .txt), or tokens of preprocess by their name before .bin",
  tokenizer: "world, bytes (the demo's), or a tokenizer.json",
  objective: "what a step minimizes; by default what learns from such rows",
  bone_r: "size of what a method adds; Bone's divides all dimensions",
  epoch_count: "passes over the data",
  merge_on_save: "also writes the merged model at each save, for any runtime",
};
const GREY = { epoch_count: "by the number of rows", objective: "by the kind of rows" };
export const named = (flag) => `“${NAMES[flag] ?? flag}”`;
const inNames = (text) => text.replace(/--(\w+)/g, (_, flag) => named(flag));

// A field made from a flag (form.py), with what its help says of the value that is chosen; change(value) hears of it.
export function flagField(made, label, value, change, endings = []) {
  const { flag, kind, values, words: told, required } = made, id = `flag-${flag}`;
  const help = HELP[flag] ?? inNames(made.help), grey = GREY[flag] ?? inNames(made.default);
  let box, input;
  if (kind === "path" || kind === "paths") {
    ({ box, input } = pathField(id, label, { value, endings, several: kind === "paths", folders: flag === "proj_dir" || flag === "data_file", help }));
    input.placeholder = grey;
  } else {
    if (kind === "on") input = el("input", { id, type: "checkbox", checked: value === "on" });
    else if (kind === "choice" || kind === "switch") {
      const short = (one) => (told[one] ? `${one}: ${told[one].length > 60 ? `${told[one].slice(0, 60)} …` : told[one]}` : one);
      input = el("select", { id }, el("option", { value: "" }, grey ? `default: ${grey}` : "default"),
        values.map((one) => el("option", { value: one, selected: one === value }, inNames(short(one)))));
    } else input = el("input", { id, value, placeholder: grey, spellcheck: false, autocomplete: "off" });
    box = el("div", {}, el("label", { htmlFor: id }, label), input, helpLine(input, help));
  }
  const explain = () => {
    const text = inNames(told[input.value || made.default] ?? help);
    if (box.lastElementChild.textContent !== text) box.lastElementChild.replaceWith(helpLine(input, text));
  };
  explain();
  input.title = `--${flag}`;
  if (required) input.required = true;
  input.addEventListener("input", () => {
    explain();
    change(kind === "on" ? (input.checked ? "on" : "") : input.value.trim());
  });
  return box;
}

// A dialog with the files below the root; -> the one chosen, or null.
function choose(label, start, folders, endings) {
  return new Promise((resolve) => {
    const list = el("ul", { className: "list" }), where = el("p", { className: "note" }), error = el("div");
    const done = (value) => { dialog.close(); dialog.remove(); resolve(value); };
    const here = { path: "" };
    const pick = folders ? el("button", { type: "button", className: "main", onclick: () => done(here.path || ".") }, "This folder") : null;
    const came = el("p", { className: "note", role: "status" });
    const other = el("input", { id: "other", type: "file", accept: endings.join(), onchange: () => {
      upload(other.files[0], came).then(done, (problem) => tell(error, problem));
    } });
    const dialog = el("dialog", { oncancel: (event) => { if (event.target === dialog) done(null); }, "aria-label": label }, el("h2", {}, label), where, error, list,
      el("label", { htmlFor: "other" }, "Or a file from elsewhere on this computer, such as Downloads: it is copied here"), other, came,
      el("div", { className: "row" }, pick, el("button", { type: "button", onclick: () => done(null) }, "Cancel")));
    async function open(path) {
      try {
        const entries = await get("/api/files", { path });
        here.path = path;
        where.textContent = path || "in the folder that was opened";
        const rows = entries.filter((entry) => entry.folder || !endings.length || endings.some((end) => entry.name.endsWith(end)));
        const up = path ? [{ name: path.split("/").slice(0, -1).join("/"), folder: true, up: true }] : [];
        list.replaceChildren(...[...up, ...rows].map((entry) => el("li", {}, el("button", {
          type: "button", className: "entry", onclick: () => (entry.folder ? open(entry.name) : done(entry.name)),
        }, entry.up ? "↑ up" : `${entry.folder ? "▸ " : ""}${entry.name.split("/").at(-1)}`),
        entry.folder ? null : el("span", { className: "state" }, size(entry.bytes)))));
        if (!list.childElementCount) list.append(el("li", { className: "note" }, endings.length ? `no folder, and no file that ends in ${endings.join(" or ")}` : "nothing here"));
        tell(error, null);
      } catch (problem) {
        if (path) open(""); else tell(error, problem);
      }
    }
    document.body.append(dialog);
    dialog.showModal();
    open(start.split("/").slice(0, -1).join("/"));
  });
}

export function size(bytes) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  const power = Math.min(bytes ? Math.floor(Math.log10(bytes) / 3) : 0, units.length - 1);
  return `${(bytes / 1000 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

export function remember(name, value) {
  localStorage.setItem(`rwkv-peft ${name}`, JSON.stringify(value));
}

export function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`rwkv-peft ${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}
