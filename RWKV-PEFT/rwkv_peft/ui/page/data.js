// Data: rows as the model will see them.
import { el, figure, number, pathField, post, recall, remember, tell } from "./lib.js";

export async function dataPage(place) {
  const kept = recall("data", { path: "", tokenizer: "world", data_type: "sft", ctx_len: "1024" });
  const path = pathField("path", "File or folder of rows", { value: kept.path, help: ".jsonl, .json, .csv, .tsv, .parquet, .txt" });
  const tokenizer = el("input", { id: "tokenizer", value: kept.tokenizer, spellcheck: false });
  const type = el("select", { id: "rows" }, ...Object.entries({
    sft: "chats, questions and answers, texts", pairs: "pairs: a better and a worse answer", labels: "answers with a label", prompts: "prompts for rewards",
  }).map(([value, text]) => el("option", { value, selected: value === kept.data_type }, text)));
  const limit = el("input", { id: "ctx", type: "number", min: 1, value: kept.ctx_len });
  const show = el("button", { className: "main" }, "Show");
  const error = el("div"), result = el("div", { "aria-live": "polite" });
  const form = el("form", { onsubmit: look }, el("div", { className: "fields" }, path.box,
    el("div", {}, el("label", { htmlFor: "rows" }, "Rows are"), type),
    el("div", {}, el("label", { htmlFor: "tokenizer" }, "Tokenizer"), tokenizer, el("p", { className: "help" }, "world, bytes, or a vocabulary file")),
    el("div", {}, el("label", { htmlFor: "ctx" }, "Longest row, tokens"), limit, el("p", { className: "help" }, "--ctx_len of the run"))),
  el("div", { className: "row" }, show));
  place.append(el("h1", {}, "Data"), el("p", { className: "lead" },
    "Choose a file of rows. You see what the model will see, with the tokens that it learns marked, before anything trains."), form, error, result);

  async function look(event) {
    event?.preventDefault();
    const asked = { path: path.input.value.trim(), tokenizer: tokenizer.value.trim(), data_type: type.value };
    remember("data", { ...asked, ctx_len: limit.value });
    show.disabled = true;
    tell(error, null);
    result.replaceChildren("reading …");
    try {
      if (!asked.path) throw new Error("name a file first");
      draw(await post("/api/preview", asked), asked);
    } catch (problem) {
      result.replaceChildren();
      tell(error, problem);
    }
    show.disabled = false;
  }

  function draw(found, asked) {
    const longest = Number(limit.value) || Infinity;
    const total = found.sizes.reduce((sum, size) => sum + size, 0);
    const cut = found.sizes.filter((size) => size > longest + 1).length;
    const most = found.sizes.reduce((a, b) => Math.max(a, b), 0);
    const bars = el("div", { className: "scroll" });
    result.replaceChildren(
      el("div", { className: "figures" }, figure("rows read", number(found.sizes.length + found.bad)), figure("tokens", number(total)),
        figure("tokens that count", `${Math.round((100 * found.counted) / Math.max(total, 1))} %`), figure("longest row", number(most)),
        figure(`longer than ${limit.value}`, number(cut)), figure("refused", number(found.bad))),
      cut ? el("p", { className: "note" }, `${cut} rows lose the front of their prompt; a larger --ctx_len keeps them whole.`) : "",
      ...found.notes.map((line) => el("p", { className: "note" }, line)),
      found.sizes.length >= found.rows ? el("p", { className: "note" }, `These are the first ${number(found.rows)} rows.`) : "",
      el("h2", {}, "Lengths"), bars, el("h2", {}, "As the model sees them"),
      ...found.documents.map((row, n) => el("div", { className: "document" }, el("h3", {}, `row ${n + 1}: ${row.title}`),
        ...row.pieces.map(([text, counts]) => (counts ? el("mark", {}, text) : text)))),
      el("div", { className: "row" }, el("button", { className: "main", type: "button", onclick: () => train(asked) }, "Train on this")));
    histogram(bars, found.sizes);
  }

  function train(asked) {
    const flags = recall("train", {});
    remember("train", { ...flags, data_file: asked.path, data_type: asked.data_type, tokenizer: asked.tokenizer, ctx_len: limit.value });
    location.hash = "#train";
  }

  if (kept.path) look();
}

function histogram(place, sizes) {
  const classes = new Map();
  for (const size of sizes) {
    const power = Math.ceil(Math.log2(Math.max(size, 1)));
    classes.set(power, (classes.get(power) ?? 0) + 1);
  }
  const powers = [...classes.keys()].sort((a, b) => a - b), most = Math.max(...classes.values());
  const rows = [];
  for (let power = powers[0]; power <= powers.at(-1); power += 1) {
    const count = classes.get(power) ?? 0;
    rows.push(el("tr", {}, el("td", {}, `up to ${(2 ** power).toLocaleString("en")}`), el("td", {}, number(count)),
      el("td", {}, el("progress", { max: most, value: count, "aria-label": `${count} rows` }))));
  }
  place.append(el("table", {}, el("tr", {}, el("th", {}, "tokens"), el("th", {}, "rows"), el("th", {}, "")), ...rows));
}
