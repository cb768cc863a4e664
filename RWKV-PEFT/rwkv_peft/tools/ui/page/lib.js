// What all pages share: elements, requests, files, fields. Text from files is put in as text, never as HTML.
import { has, labelOf, t } from "./texts.js";

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
  if (response.status === 401) throw new Error(t("server.anew"));
  const text = await response.text();
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Error(text || t("server.status", response.status));
  }
  if (!response.ok) throw Object.assign(new Error(found.error?.message ?? found.error ?? text), { found });
  return found;
}

const gone = () => { throw new Error(t("server.gone")); };

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
  return h ? t("time.hours", h, m) : m ? t("time.minutes", m, s % 60) : t("time.seconds", s);
}

export const number = (value, digits = 4) =>
  typeof value !== "number" ? "–" : Number.isInteger(value) ? value.toLocaleString("en") : Number(value.toPrecision(digits)).toString();

export function figure(name, value, warns = false) {
  return el("div", { className: `figure ${warns ? "warns" : ""}` }, el("b", {}, String(value)), el("span", {}, name));
}

export function copyButton(text, label = t("copy")) {
  const button = el("button", { type: "button" }, label);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text());
    button.textContent = t("copied");
    setTimeout(() => { button.textContent = label; }, 1500);
  });
  return button;
}

// Takes a file of this computer into the folder, in parts that the server takes; shows how far it is in `place`. -> its name.
async function upload(file, place) {
  for (let begin = 0; ;) {
    const part = file.slice(begin, begin + PART);
    place.textContent = t("file.coming", file.name, size(begin), size(file.size));
    const query = new URLSearchParams({ name: file.name, begin, size: file.size });
    const body = await part.arrayBuffer().catch(() => { throw new Error(t("file.unreadable", file.name)); });
    const { name } = await answer(await fetch(`/api/files?${query}`, { method: "POST", body }).catch(gone));
    begin += part.size;
    if (!name) continue;
    place.textContent = t("file.came", name);
    return name;
  }
}
const PART = 8 << 20; // bytes

// Several names in one field are set apart by spaces; one that has spaces stands in quotes.
export const listed = (text) => (text.match(/"[^"]*"|\S+/g) ?? []).map((word) => word.replace(/^"(.*)"$/, "$1"));
export const asListed = (name) => (/\s/.test(name) ? `"${name}"` : name);

// Help below a field, which a screen reader reads with it.
export function helpLine(input, text) {
  const line = el("p", { id: `${input.id}-help`, className: "help" }, text);
  input.setAttribute("aria-describedby", line.id);
  return line;
}

// A choice of one among cards: options = [{value, title, text, disabled}]; change(value) hears of each choice.
export function cards(legend, options, chosen, change) {
  const made = options.map(({ value, title, text, disabled = false }, n) => el("label", { className: "pick", hidden: n >= CARDS && value !== chosen },
    el("input", { type: "radio", name: legend, value, checked: value === chosen, disabled, onchange: () => change(value) }), el("b", {}, title), el("span", { className: "help" }, text)));
  const all = el("button", { type: "button", onclick: () => { for (const one of [...made, all]) one.hidden = one === all; } }, t("cards.all", number(made.length)));
  return el("fieldset", { className: "picks" }, el("legend", {}, legend), made, made.some((one) => one.hidden) ? all : "");
}
const CARDS = 8; // that are shown before all are asked for

export const folded = (title, ...children) => el("details", {}, el("summary", {}, title), ...children);

// A labelled field for a file below the root, with a button that looks for it.
export function pathField(name, label, { value = "", help = "", folders = false, endings = [], several = false } = {}) {
  const input = el("input", { id: name, name, value, spellcheck: false, autocomplete: "off" });
  const browse = el("button", { type: "button", title: t("file.look", label), "aria-label": t("file.look", label) }, "…");
  const take = (found) => {
    input.value = several ? asListed(found) : found;
    for (const kind of ["input", "change"]) input.dispatchEvent(new Event(kind, { bubbles: true }));
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

// Starts a command, waits for its end -> {id, code}.
export async function ended(command) {
  const { id } = await post("/api/jobs", { words: command });
  for (;;) {
    const { state, code } = await get(`/api/jobs/${id}`);
    if (state !== "running") return { id, code };
    await new Promise((resolve) => { setTimeout(resolve, 300); });
  }
}

// A choice between what trained last in a run and what held best for other rows, if the run has both; told(file) hears of
// the one that is to be taken and of each other choice. -> {box, show, choose}; show(folder) fills the box -> the files.
export function adapterChoice(told) {
  const box = el("div", { hidden: true });
  async function show(folder) {
    box.hidden = true;
    const found = folder ? await get("/api/runs/taken", { folder }).catch(() => null) : null;
    if (!found) return [];
    const files = [found.file, found.other, found.learned].filter(Boolean);
    const called = (file) => t(`which.${/-(best|learned)\.\w+$/.exec(file)?.[1] ?? "last"}`, file.split("/").at(-1));
    const select = el("select", { id: "which", onchange: () => told(select.value) },
      files.map((file) => el("option", { value: file }, called(file))));
    box.replaceChildren(el("label", { htmlFor: "which" }, t("which")), select, helpLine(select, found.note || t("which.note")));
    box.hidden = files.length < 2;
    told(found.file);
    return files;
  }
  function choose(file) {
    box.querySelector("select").value = file;
    told(file);
  }
  return { box, show, choose };
}

export const named = (flag) => `“${labelOf(flag)}”`;
const inNames = (text) => text.replace(/--(\w+)/g, (_, flag) => named(flag));
const orElse = (key, text) => (has(key) ? t(key) : text);

// A field made from a flag (form.py), with what its help says of the value that is chosen; change(value) hears of it.
export function flagField(made, label, value, change, endings = []) {
  const { flag, kind, values, words: told, required } = made, id = `flag-${flag}`;
  const help = orElse(`help.${flag}`, inNames(made.help)), grey = orElse(`grey.${flag}`, inNames(made.default));
  let box, input;
  if (kind === "path" || kind === "paths") {
    ({ box, input } = pathField(id, label, { value, endings, several: kind === "paths", folders: flag === "proj_dir" || flag === "data_file", help }));
    input.placeholder = grey;
  } else {
    if (kind === "on") input = el("input", { id, type: "checkbox", checked: value === "on" });
    else if (kind === "choice" || kind === "switch") {
      input = el("select", { id }, el("option", { value: "" }, grey ? t("default", orElse(`value.${flag}.${grey}`, grey)) : t("default.none")),
        values.map((one) => el("option", { value: one, selected: one === value }, orElse(`value.${flag}.${one}`, one))));
    } else input = el("input", { id, value, placeholder: grey, spellcheck: false, autocomplete: "off" });
    box = el("div", {}, el("label", { htmlFor: id }, label), input, helpLine(input, help));
  }
  const explain = () => {
    const chosen = input.value || made.default, text = told[chosen] && !has(`value.${flag}.${chosen}`) ? `${help} ${chosen}: ${inNames(told[chosen])}.` : help;
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
    const pick = folders ? el("button", { type: "button", className: "main", onclick: () => done(here.path || ".") }, t("file.here")) : null;
    const came = el("p", { className: "note", role: "status" });
    const other = el("input", { id: "other", type: "file", accept: endings.join(), onchange: () => {
      upload(other.files[0], came).then(done, (problem) => tell(error, problem));
    } });
    const dialog = el("dialog", { oncancel: (event) => { if (event.target === dialog) done(null); }, "aria-label": label }, el("h2", {}, label), where, error, list,
      el("label", { htmlFor: "other" }, t("file.elsewhere")), other, came,
      el("div", { className: "row" }, pick, el("button", { type: "button", onclick: () => done(null) }, t("cancel"))));
    async function open(path) {
      try {
        const entries = await get("/api/files", { path });
        here.path = path;
        where.textContent = path || t("file.root");
        const rows = entries.filter((entry) => entry.folder || !endings.length || endings.some((end) => entry.name.endsWith(end)));
        const up = path ? [{ name: path.split("/").slice(0, -1).join("/"), folder: true, up: true }] : [];
        list.replaceChildren(...[...up, ...rows].map((entry) => el("li", {}, el("button", {
          type: "button", className: "entry", onclick: () => (entry.folder ? open(entry.name) : done(entry.name)),
        }, entry.up ? t("file.up") : `${entry.folder ? "▸ " : ""}${entry.name.split("/").at(-1)}`),
        entry.folder ? null : el("span", { className: "state" }, size(entry.bytes)))));
        if (!list.childElementCount) list.append(el("li", { className: "note" }, endings.length ? t("file.none", endings.join(", ")) : t("file.nothing")));
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

// A text that ends in one piece over and over -> {text: with three of them, times: how often it stood there}, or the text
// and 0. Marks, such as a line of dashes, may stand longer than words.
export function withoutRepeats(text) {
  for (let long = 1; long <= 200; long += 1) {
    const piece = text.slice(-long), least = Math.max(12, Math.ceil((/[\p{L}\p{N}]/u.test(piece) ? 120 : 400) / long));
    let times = 0, end = text.length;
    for (; end >= long && text.startsWith(piece, end - long); end -= long) times += 1;
    if (times >= least) return { text: text.slice(0, end) + piece.repeat(3), times };
  }
  return { text, times: 0 };
}

export function size(bytes) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  const power = Math.min(bytes ? Math.floor(Math.log10(bytes) / 3) : 0, units.length - 1);
  return `${(bytes / 1000 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

// What the page remembers of a folder; keepFor says of which.
let root = "";
export const keepFor = (folder) => { root = folder; };
const keyOf = (name) => `rwkv-peft ${root} ${name}`;

export function remember(name, value) {
  localStorage.setItem(keyOf(name), JSON.stringify(value));
}

export function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(keyOf(name))) ?? otherwise;
  } catch {
    return otherwise;
  }
}

// The flags that are set for the next training, by name; settle(changes) sets some.
export const settings = () => recall("train", {});
export const settle = (changes) => remember("train", { ...settings(), ...changes });
