// Data: rows as the model will see them.
import { asListed, el, figure, flagField, helpLine, listed, number, pathField, post, recall, remember, tell } from "./lib.js";

export async function dataPage(place, about) {
  const asked = { path: "", tokenizer: "world", data_type: "sft", ctx_len: "1024", sft_field: "", ...recall("data", {}) };
  const path = pathField("path", "File or folder of rows", { value: asked.path, folders: true, help: ".jsonl, .json, .csv, .tsv, .parquet, .txt" });
  const flags = new Map(about.form.flatMap((group) => group.fields).map((field) => [field.flag, field]));
  const made = flags.get("data_type");
  const values = made.values.filter((value) => value !== "binidx");
  const type = flagField({ ...made, values, default: "sft" }, "Rows are", asked.data_type, (value) => { asked.data_type = value || "sft"; });
  const tokenizer = el("input", { id: "tokenizer", value: asked.tokenizer, spellcheck: false });
  const columns = flagField(flags.get("sft_field"), "Columns", asked.sft_field, (value) => { asked.sft_field = value; });
  const limit = el("input", { id: "ctx", type: "number", min: 1, value: asked.ctx_len });
  const show = el("button", { className: "main" }, "Show");
  const error = el("div"), result = el("div", { "aria-live": "polite" });
  const form = el("form", { onsubmit: look }, el("div", { className: "fields" }, path.box, type,
    el("div", {}, el("label", { htmlFor: "tokenizer" }, "Tokenizer"), tokenizer, helpLine(tokenizer, "that of the base model: world, bytes (the demo's), or a vocabulary file")),
    el("div", {}, el("label", { htmlFor: "ctx" }, "Longest row, tokens"), limit, helpLine(limit, "the same field of Train")), columns),
  el("div", { className: "row" }, show));
  place.append(el("h1", {}, "Data"), el("p", { className: "lead" },
    "Choose a file of rows, or drop one from your computer onto the page. You see what the model will see, with the tokens that it learns marked, before anything trains."), form, error, result);

  async function look(event) {
    event?.preventDefault();
    Object.assign(asked, { path: path.input.value.trim(), tokenizer: tokenizer.value.trim(), ctx_len: limit.value });
    remember("data", asked);
    show.disabled = true;
    tell(error, null);
    columns.classList.remove("wrong");
    result.replaceChildren("reading …");
    try {
      if (!asked.path) throw new Error("name a file first");
      draw(await post("/api/preview", { ...asked, fields: listed(asked.sft_field) }));
    } catch (problem) {
      result.replaceChildren();
      tell(error, problem);
      columns.classList.toggle("wrong", problem.message.includes("--sft_field"));
      const other = /--data_type (\w+)/.exec(problem.message)?.[1];
      if (values.includes(other)) offer(other);
    }
    show.disabled = false;
  }

  // A button that looks again, at rows of another kind.
  function offer(kind) {
    const field = type.querySelector("select");
    result.append(el("button", { type: "button", onclick: () => { field.value = kind; field.dispatchEvent(new Event("input")); look(); } }, `Show them as ${kind}`));
  }

  function draw(found) {
    const longest = Number(asked.ctx_len) || Infinity;
    const total = found.sizes.reduce((sum, size) => sum + size, 0);
    const cut = found.sizes.filter((size) => size > longest + 1).length;
    const most = found.sizes.reduce((a, b) => Math.max(a, b), 0);
    result.replaceChildren(
      el("div", { className: "figures" }, figure("rows read", number(found.sizes.length + found.bad)), figure("tokens", number(total)),
        figure("of them learned", `${Math.round((100 * found.counted) / Math.max(total, 1))} %`), figure("tokens of the longest row", number(most)),
        figure(`rows longer than ${number(longest)}`, number(cut), cut > 0 && !found.texts), figure("rows refused", number(found.bad), found.bad > 0)),
      found.texts ? el("p", { className: "note" }, `All of a text is learned, in rows of ${number(longest)} tokens.`) : "",
      cut && !found.texts ? el("p", { className: "note" }, `${cut === 1 ? "1 row is" : `${number(cut)} rows are`} cut to ${number(longest)} tokens, the front of the prompt first; a longer longest row keeps them whole.`) : "",
      found.bad ? el("p", { className: "note" }, "Train on this leaves such rows out.") : "",
      ...found.notes.map((line) => el("p", { className: "note" }, line)),
      found.sizes.length >= found.rows ? el("p", { className: "note" }, `These are the first ${number(found.rows)} rows.`) : "",
      el("div", { className: "row" }, el("button", { className: "main", type: "button", onclick: () => train(found.bad) }, "Train on this")),
      el("h2", {}, "As the model sees them"),
      ...found.documents.map((row, n) => el("div", { className: "document" }, el("h3", {}, `row ${n + 1}: ${row.title}`),
        ...row.pieces.map(([text, counts]) => (counts ? el("mark", {}, text) : text)))),
      el("h2", {}, "Lengths"), histogram(found.sizes));
  }

  function train(bad) {
    const { path: name, data_type, tokenizer, ctx_len, sft_field } = asked;
    remember("train", { ...recall("train", {}), data_file: asListed(name), data_type, tokenizer, ctx_len, sft_field, skip_bad_rows: bad ? "on" : "" });
    location.hash = "#train";
  }

  if (asked.path) look();
}

function histogram(sizes) {
  const classes = new Map();
  for (const size of sizes) {
    const power = Math.ceil(Math.log2(Math.max(size, 1)));
    classes.set(power, (classes.get(power) ?? 0) + 1);
  }
  const most = Math.max(...classes.values());
  return el("table", { className: "bars" }, el("tr", {}, el("th", {}, "tokens"), el("th", {}, "rows"), el("td", {})),
    [...classes].sort(([a], [b]) => a - b).map(([power, count]) => el("tr", {},
      el("td", {}, power ? `${number(2 ** (power - 1) + 1)} to ${number(2 ** power)}` : "1"), el("td", {}, number(count)),
      el("td", {}, el("progress", { max: most, value: count, "aria-label": `${count} rows` })))));
}
