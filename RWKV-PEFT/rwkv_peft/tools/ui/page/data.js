// Rows: what the model will learn of a file, as conversations in which the learned words are marked.
import { demoOffer } from "./base.js";
import { asListed, cards, el, figure, flagField, folded, get, listed, number, pathField, post, renew, settings, settle, size, tell } from "./lib.js";
import { has, labelOf, t } from "./texts.js";
import { chatOffer, rowWriter } from "./write.js";

const SUITED = ["ctx_len", "sft_field", "sft_think", "tool_form", "turns_in_text", "encoding", "document_end"]; // to one file, and maybe to no other
const FLAGS = ["data_type", "tokenizer", ...SUITED]; // under More

export async function dataPage(place, about, signal) {
  const { rows } = await get("/api/proposals"), set = settings(), names = rows.map((one) => one.name);
  const asked = Object.fromEntries([...FLAGS, "sft_as"].map((flag) => [flag, (set.data_file || flag === "tokenizer" ? set[flag] : "") ?? ""]));
  const proposed = set.data_file ? [] : rows.filter((one) => one.sound).map((one) => one.name);
  asked.path = listed(set.data_file ?? "")[0] ?? proposed.shift() ?? "";
  const other = pathField("path", t("rows.other"), { value: names.includes(asked.path) ? "" : asked.path, folders: true, help: t("rows.other.help") });
  const list = cards(t("rows.found"), rows.map(({ name, bytes, sound }) => ({ value: name, title: name, text: sound ? size(bytes) : t("rows.unsound", size(bytes)) })), asked.path, (name) => { other.input.value = ""; choose(name); });
  const made = new Map(about.form.flatMap((group) => group.fields).map((field) => [field.flag, field]));
  const fields = new Map(FLAGS.map((flag) => [flag, flagField(fit(made.get(flag)), labelOf(flag), asked[flag], (value) => { asked[flag] = value; })]));
  const inputOf = (flag) => fields.get(flag).querySelector("input, select");
  const more = folded(t("more"), el("div", { className: "fields" }, ...fields.values()), el("div", { className: "row" }, el("button", {}, t("rows.show"))));
  const form = el("form", { onsubmit: (event) => { event.preventDefault(); choose(other.input.value.trim() || asked.path); } }, other.box, more);
  const take = el("button", { type: "button", className: "main", hidden: true, onclick: train }, t("rows.take"));
  const writing = el("div"), write = el("button", { type: "button", onclick: () => writer() }, t("write.title"));
  writing.append(el("div", { className: "row" }, write));
  const error = el("div"), how = el("div"), result = el("div", { "aria-live": "polite" });
  place.append(el("h1", {}, t("nav.data")), el("p", { className: "lead" }, t("rows.lead")),
    ...(rows.length ? [list] : [el("p", { className: "note" }, t("rows.none")), demoOffer(about, signal)]), writing,
    form, error, how, el("div", { className: "row" }, take), result);
  other.input.addEventListener("change", () => choose(other.input.value.trim()));
  let found = null, looking = 0;
  if (asked.path) look();

  // Opens the form for rows; a change shows the file that they are in.
  async function writer() {
    writing.replaceChildren(await rowWriter(asked.path.endsWith(".jsonl") ? asked.path : about.mine, about.mine, wrote));
    writing.querySelector("textarea").focus();
  }

  function wrote(name) {
    if (!names.includes(name)) other.input.value = name;
    choose(name);
  }

  // Shows a file; another one is read as it is again.
  function choose(name) {
    proposed.length = 0;
    if (name !== asked.path) {
      for (const flag of [...SUITED, "sft_as"]) put(flag, "");
      how.replaceChildren();
    }
    asked.path = name;
    for (const radio of list.querySelectorAll("input")) radio.checked = radio.value === name;
    look();
  }

  async function look() {
    const mine = (looking += 1);
    tell(error, null);
    take.hidden = true;
    for (const box of fields.values()) box.classList.remove("wrong");
    result.replaceChildren(t("rows.reading"));
    try {
      if (!asked.path) throw new Error(t("rows.first"));
      const given = Object.entries({ ...asked, ctx_len: "" }).filter(([, value]) => value);
      const answer = await post("/api/preview", { ...Object.fromEntries(given), sft_field: listed(asked.sft_field) });
      if (mine !== looking) return;
      draw(found = answer);
      renew(how, ...waysToRead(answer));
      if (answer.texts && asked.path.endsWith(".txt")) {
        const offered = await chatOffer(asked.path, about.mine, wrote);
        if (mine === looking) result.prepend(offered);
      }
    } catch (problem) {
      if (mine !== looking) return;
      result.replaceChildren();
      if (proposed.length) { // nobody has chosen this one
        asked.path = proposed.shift();
        for (const radio of list.querySelectorAll("input")) radio.checked = radio.value === asked.path;
        return look();
      }
      tell(error, inWords(problem.message));
      error.firstElementChild.append(folded(t("rows.reader"), el("span", {}, problem.message)));
      for (const [flag, box] of fields) if (flag !== "sft_field" && problem.message.includes(`--${flag}`)) box.classList.add("wrong");
      more.open ||= more.querySelector(".wrong") !== null;
      const kind = /--data_type (\w+)/.exec(problem.message)?.[1], kinds = [...inputOf("data_type").options].map((one) => one.value);
      renew(how, ...waysToRead(problem.found ?? {}, kinds.includes(kind) ? kind : ""));
    }
  }

  // Sets a flag of the reading, and its field if it has one under More.
  function put(flag, value) {
    const input = fields.has(flag) ? inputOf(flag) : {};
    input.value = asked[flag] = value;
  }

  // Menus of the fields with the question and the answer, and of those who talk; a button for each other way to read the
  // rows; all fields. What is chosen is a flag of the training.
  function waysToRead({ fields: values = {}, taken = {}, names = {}, offers = [] }, kind = "") {
    const all = Object.keys(values), given = listed(asked.sft_field), by = (meaning) => all.find((name) => taken[name] === meaning) ?? "";
    const isKnown = by("question") || given.length > 0;
    const hasPairs = (asked.data_type || "sft") === "sft" && all.length && (isKnown || !Object.keys(taken).length);
    const question = menu("question", t(isKnown ? "rows.question none" : "rows.choose"), all, given.length === 1 ? "" : given.at(-2) ?? by("question"), changed);
    const answer = menu("answer", t(isKnown ? "rows.answer none" : "rows.choose"), all, given.at(-1) ?? by("answer"), changed);
    const whose = menu("whose", t("rows.choose"), Object.keys(names), asked.sft_as, () => set("sft_as", whose.value), (name) => t("rows.whose one", name, number(names[name])));
    function changed() {
      if (answer.value || !question.value) set("sft_field", answer.value && [question.value, answer.value].filter(Boolean).map(asListed).join(" "));
    }
    function set(flag, value) {
      put(flag, value);
      look();
    }
    const ways = new Map([...offers, ...(kind ? [["data_type", kind]] : [])].map(([flag, value]) => [`--${flag} ${value}`, [flag, flag === "sft_field" ? namesIn(value, all) : value]]));
    const menus = [...(hasPairs ? [question, answer] : []), ...(Object.keys(names).length ? [whose] : [])];
    return [
      menus.length ? el("div", { className: "fields" }, menus.map((one) => el("div", {}, el("label", { htmlFor: one.id }, t(`rows.${one.id}`)), one))) : "",
      el("div", { className: "row" }, [...ways].filter(([, [flag, value]]) => asked[flag] !== value).map(([title, [flag, value]]) =>
        el("button", { type: "button", title, onclick: () => set(flag, value) }, wayInWords(flag, value)))),
      all.length ? folded(t("rows.fields"), el("div", { className: "scroll" }, el("table", {}, el("tr", {}, ["field", "first", "taken"].map((name) => el("th", {}, t(`rows.fields.${name}`)))),
        all.map((name) => el("tr", {}, [name, values[name].replace(/^'(.*)'$/, "$1"), meaningOf(taken[name])].map((text) => el("td", {}, text))))))) : "",
    ].filter((part) => part.childElementCount);
  }

  function draw({ sizes, counted, bad, texts, notes, rows: most, ctx_len, documents }) {
    inputOf("ctx_len").placeholder = ctx_len;
    take.hidden = false;
    const limit = Number(asked.ctx_len) || ctx_len, total = sizes.reduce((sum, one) => sum + one, 0);
    const cut = sizes.filter((one) => one > limit + 1).length, note = (text) => el("p", { className: "note" }, text);
    const own = notes.filter((words) => noted(words) !== words); // the others stand above as they are
    result.replaceChildren(
      el("div", { className: "figures" }, figure(t("rows.read"), number(sizes.length + bad)), figure(t("rows.tokens"), number(total)),
        figure(t("rows.learned"), `${Math.round((100 * counted) / Math.max(total, 1))} %`), figure(t("rows.longest"), number(sizes.reduce((a, b) => Math.max(a, b), 0))),
        cut && !texts ? figure(t("rows.cut", number(limit)), number(cut), true) : "", bad ? figure(t("rows.refused"), number(bad), true) : ""),
      ...[texts && t("rows.text.note", number(limit)), cut && !texts && t("rows.cut.note", number(limit)), bad && t("rows.refused.note"),
        ...notes.map(noted), t("rows.tokens.note"), sizes.length >= most && t("rows.some", number(most))].filter(Boolean).map(note),
      own.length ? folded(t("rows.reader"), ...own.map(note)) : "",
      ...documents.map(({ tokens, learned, turns }, n) => el("section", { className: "document" },
        el("h3", {}, t("rows.title", n + 1, number(tokens), number(learned))), turns.map(bubble))),
      folded(t("rows.lengths"), histogram(sizes)));
  }

  function train() {
    const { path: name, ...flags } = asked;
    settle({ ...flags, data_file: asListed(name), data_type: asked.data_type || "sft", ctx_len: asked.ctx_len || String(found.ctx_len), skip_bad_rows: found.bad ? "on" : "" });
    location.hash = "#train";
  }
}

// What is wrong with a file of rows, in a sentence, by the reader's message.
const WRONG = [
  ["missing", /no such file/], ["kind", /--data_type \w+/], ["names", /--sft_as/], ["json", /(?:, line (\d+): )?not JSON/], ["encoding", /--encoding/], ["utf8", /UTF-8/],
  ["tokenizer", /--tokenizer/], ["fields", /--sft_field|known are|columns|fields/], ["none", /no document|no row\b|holds no/],
];
function inWords(message) {
  const [name, form] = WRONG.find(([, one]) => one.test(message)) ?? ["other", /()/], line = form.exec(message)?.[1];
  return t(line ? `rows.wrong.${name} line` : `rows.wrong.${name}`, line);
}

// A note of the reader's in a sentence, by the number of rows or the names in it; "" for a line on rows that are refused,
// whose number the page shows.
const NOTED = [
  ["encoding", /^note: .* is read as ([\w-]+);/], ["ends", /^note: .* is one document, and holds (.+) ([\d,]+) times?;/], ["columns", /^note: read .*; the first row:/],
  ["chats", /^note: read ([^;]+)/], ["begin", /^note: these are the first ([\d,]+) bytes/], ["split", /^note: .*: the split (\S+) is read/],
  ["sheet", /^note: .*: the sheet (.+) is read/], ["files", /^note: .*: left out (.+)/], ["thinking", /^([\d,]+) rows? with thinking, ([\d,]+)/],
  ["wordless", /^note: ([\d,]+) rows? with an empty answer/], ["unanswered", /^note: ([\d,]+) rows? without an answer/], ["unfinished", /^note: ([\d,]+) rows? whose last turn/],
  ["repeated", /^note: ([\d,]+) rows? the same as/], ["tagged", /^note: ([\d,]+) rows? whose words list tools/], ["turns", /^note: ([\d,]+) rows? in which .* holds turns/],
  ["forging", /^note: ([\d,]+) rows? in which .* as a tool's result/], ["marks", /^note: learned as text: (.+?); /], ["unread", /^note: not read: (.+?); preprocess/],
  ["empty", /^([\d,]+) empty rows? left out/], ["equal", /^([\d,]+) pairs? of equal answers/], ["bare", /^([\d,]+) rows? without a prompt or an answer/],
];
function noted(words) {
  const [name, form] = NOTED.find(([, one]) => one.test(words)) ?? [], values = form?.exec(words).slice(1) ?? [];
  if (/^ |^[\d,]+ bad rows?\b/.test(words)) return "";
  return name ? t(`rows.noted.${name}`, ...values.map((value) => value.replace(/ \([\d,]+ (?:row|chat)s?\)/g, ""))) : words;
}

// The names of fields in an offer, as the flag's field takes them: two may have spaces.
function namesIn(value, all) {
  const pair = all.map((name) => [name, value.slice(name.length + 1)]).find(([name, other]) => value === `${name} ${other}` && all.includes(other));
  return pair?.map(asListed).join(" ") ?? value;
}

// A menu of names, of which one may be chosen; id is the text of its label, too.
function menu(id, none, names, chosen, onchange, inWords = (name) => name) {
  return el("select", { id, onchange }, el("option", { value: "" }, none), names.map((name) => el("option", { value: name, selected: name === chosen }, inWords(name))));
}

const meaningOf = (meaning = "") => (has(`meaning.${meaning}`) ? t(`meaning.${meaning}`) : meaning);

// What a button does that sets a flag.
function wayInWords(flag, value) {
  const named = has(`value.${flag}.${value}`) ? t(`value.${flag}.${value}`) : value, [question, answer] = listed(value);
  if (flag === "sft_field") return answer ? t("rows.way pair", question, answer) : t("rows.way all");
  return has(`rows.way.${flag}`) ? t(`rows.way.${flag}`, named) : `${labelOf(flag)}: ${named}`;
}

// The field of a flag as this page has it: rows are no tokens, and the limit comes from the rows.
function fit(made) {
  if (made.flag === "data_type") return { ...made, values: made.values.filter((value) => value !== "binidx"), default: "sft" };
  return made.flag === "ctx_len" ? { ...made, default: "" } : made;
}

// A turn of a row: who speaks, and the words, of which the learned ones are marked.
function bubble({ speaker, learned, pieces }) {
  const name = t(`speaker.${speaker || (learned ? "learned" : "given")}`), mark = (text, counts) => (counts ? el("mark", {}, text) : text);
  if (speaker && pieces.length) pieces[0][0] = pieces[0][0].trimStart();
  return el("div", { className: `turn ${/^(User|Question|Instruction)$/.test(speaker) ? "user" : ""}`, dir: "auto" },
    el("small", {}, mark(name, speaker && learned)), pieces.map(([text, counts]) => mark(text, counts)));
}

function histogram(sizes) {
  const classes = new Map();
  for (const one of sizes) {
    const power = Math.ceil(Math.log2(Math.max(one, 1)));
    classes.set(power, (classes.get(power) ?? 0) + 1);
  }
  const most = Math.max(...classes.values());
  return el("table", { className: "bars" }, el("tr", {}, el("th", {}, t("rows.tokens")), el("th", {}, t("rows.read")), el("td", {})),
    [...classes].sort(([a], [b]) => a - b).map(([power, count]) => el("tr", {},
      el("td", {}, power ? t("rows.from", number(2 ** (power - 1) + 1), number(2 ** power)) : "1"), el("td", {}, number(count)),
      el("td", {}, el("progress", { max: most, value: count, "aria-label": t("rows.count", count) })))));
}
