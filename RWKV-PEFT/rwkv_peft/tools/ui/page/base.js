// Base: the model that a run begins with, one of the folder, the demo's, or an official one.
import { showJob } from "./job.js";
import { cards, copyButton, el, ended, folded, get, helpLine, pathField, post, recall, remember, settings, settle, size, tell } from "./lib.js";
import { t } from "./texts.js";

export async function basePage(place, about, signal) {
  const { bases } = await get("/api/proposals");
  const kept = settings().load_model ?? "", found = (name) => bases.find((one) => one.name === name);
  let chosen = kept || bases[0]?.name || "";
  const other = pathField("base", t("base.other"), { value: found(kept) ? "" : kept, endings: [".pth"], help: t("base.other.help") });
  const list = cards(t("base.found"), bases.map(({ name, generation, parameters, bytes }) =>
    ({ value: name, title: name, text: t("base.facts", generation, large(parameters), size(bytes)) })), chosen, (name) => { chosen = name; other.input.value = ""; });
  other.input.addEventListener("input", () => {
    chosen = other.input.value.trim();
    for (const radio of list.querySelectorAll("input")) radio.checked = radio.value === chosen;
  });
  const error = el("div", { "aria-live": "polite" }), more = [demoOffer(about, signal), await official(about, signal)];
  place.append(el("h1", {}, t("nav.base")), el("p", { className: "lead" }, t("base.lead")),
    ...(bases.length ? [list] : [el("p", { className: "note" }, t("base.none")), ...more]), other.box, error,
    el("div", { className: "row" }, el("button", { type: "button", className: bases.length ? "main" : "", onclick: take }, t("base.take"))),
    bases.length ? folded(t("base.more"), ...more) : "");

  async function take() {
    if (!chosen) return tell(error, t("base.first"));
    const { bases: now } = await get("/api/proposals"); // it may have come by a drop
    const tokenizer = now.find((one) => one.name === chosen)?.tokenizer, { demo } = about;
    const leaves = kept === demo.load_model && chosen !== kept; // what suits the demo suits no other base
    settle({ ...(leaves ? Object.fromEntries(Object.keys(demo).map((flag) => [flag, ""])) : {}), load_model: chosen, ...(tokenizer ? { tokenizer } : {}) });
    location.hash = "#data";
  }
}

// Offers the bundled model and rows: a click writes them into the folder, chooses both, and leads to the rows.
export function demoOffer({ demo }, signal) {
  const result = el("div", { "aria-live": "polite" }), button = el("button", { type: "button", className: "main", onclick: take }, t("demo.take"));

  async function take() {
    button.disabled = true;
    result.replaceChildren(t("demo.coming"));
    try {
      const { id, code } = await ended(["demo", "."]);
      result.replaceChildren();
      if (code !== 0) return showJob(result, id, signal);
      settle(demo);
      location.hash = "#data";
    } catch (problem) {
      tell(result, problem);
    }
    button.disabled = false;
  }

  return demo.load_model ? el("section", { className: "panel" }, el("h2", {}, t("demo.title")), el("p", {}, t("demo.text")), button, result) : "";
}

// Offers the official bases: a click downloads the one of the size that is chosen, from the hub or a mirror, and chooses it.
async function official({ official: names, repository, mirror }, signal) {
  const select = el("select", { id: "size", onchange: show }, Object.entries(names).map(([of, name]) => el("option", { value: of, selected: name.includes("-1.5b-") }, of.toUpperCase())));
  const place = el("input", { id: "mirror", type: "url", placeholder: mirror, value: recall("mirror", ""), onchange: () => remember("mirror", place.value.trim()) });
  const lines = el("div"), result = el("div", { "aria-live": "polite" }), button = el("button", { type: "button", onclick: take }, t("official.take"));
  const jobs = (await get("/api/jobs")).filter((job) => job.words[0] === "download" && job.state === "running");

  function show() {
    const commands = [
      `pip install huggingface_hub && hf download ${repository} ${names[select.value]} --local-dir .`,
      `pip install modelscope && modelscope download --model RWKV/rwkv7-g1 ${names[select.value]} --local_dir .`,
    ];
    lines.replaceChildren(...commands.flatMap((command) => [el("pre", { tabIndex: 0 }, command), copyButton(() => command)]));
  }

  async function take() {
    button.disabled = true;
    const address = place.value.trim();
    remember("mirror", address);
    try {
      watch(await post("/api/jobs", { words: ["download", select.value, ...(address ? ["--mirror", address] : [])] }), names[select.value]);
    } catch (problem) {
      tell(result, problem);
      button.disabled = false;
    }
  }

  // Shows a download until it has ended; it goes on while another page is open.
  function watch({ id }, name) {
    button.disabled = true;
    result.replaceChildren();
    showJob(result, id, signal, {
      bar: true,
      done() {
        settle({ load_model: name });
        dispatchEvent(new Event("hashchange"));
      },
      otherwise() {
        button.disabled = false;
        other.open = true; // a mirror, and the lines for a terminal
      },
    });
  }

  const other = folded(t("official.other"), el("label", { htmlFor: "mirror" }, t("official.mirror")), place, helpLine(place, t("official.mirror.help")),
    el("p", {}, t("official.lines")), lines,
    el("div", { className: "row" }, el("button", { type: "button", onclick: () => dispatchEvent(new Event("hashchange")) }, t("official.again"))));
  show();
  for (const job of jobs.slice(0, 1)) watch(job, names[job.words[1]] ?? job.words[1]);
  return el("section", { className: "panel" }, el("h2", {}, t("official.title")), el("p", {}, t("official.text")),
    el("label", { htmlFor: "size" }, t("official.size")), select, helpLine(select, t("official.size.help")), el("div", { className: "row" }, button), result, other);
}

const large = (count) => (count >= 1e9 ? `${(count / 1e9).toFixed(1)}B` : `${(count / 1e6).toFixed(1)}M`);
