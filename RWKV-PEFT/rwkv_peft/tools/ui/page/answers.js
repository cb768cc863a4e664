// Answers of a run as cards: to some rows before the first step and after the last, and rollouts with their rewards.
import { el, number, withoutRepeats } from "./lib.js";
import { t } from "./texts.js";

const SHOWN = 16; // cards
const LONG = 1 << 20; // words of one text times words of another: more are marked as one

// found: the lines of answers.jsonl, of which the newest step or another of the last is shown, and of rows.jsonl.
export function showAnswers(place, found, title = t("answers")) {
  const rollouts = (found["answers.jsonl"] ?? []).filter((line) => typeof line.completion === "string");
  const rows = (found["rows.jsonl"] ?? []).slice(-SHOWN);
  const steps = [...new Set(rollouts.map((line) => line.step))].reverse(), cards = el("div");
  const chosen = Number(place.dataset.step ?? -1), step = steps.includes(chosen) ? chosen : steps[0];
  const select = el("select", { "aria-label": t("answers.step"), onchange: () => {
    if (Number(select.value) === steps[0]) delete place.dataset.step; else place.dataset.step = select.value; // the newest stays the newest
    show(Number(select.value));
  } }, steps.map((one) => el("option", { value: one, selected: one === step }, t("answers.of step", number(one + 1)))));
  const show = (one) => cards.replaceChildren(...rollouts.filter((line) => line.step === one).slice(0, SHOWN).map(rollout));
  if (steps.length) show(step);
  place.replaceChildren(el("h2", {}, title),
    ...(steps.length ? [el("div", { className: "row" }, select), cards] : []),
    ...(rows.some((row) => row.after) ? [el("p", { className: "note" }, verdict(rows))] : []), ...rows.map(pair),
    steps.length || rows.length ? "" : el("p", { className: "note" }, t("answers.none")));
}

const said = (one) => (one?.text ?? "").trim();
const named = (of) => String(of).replace(/^(training|held-out|feedback|held out|to keep)/, (kind) => t(`answers.${kind}`));
const brief = (one) => withoutRepeats(said(one)).text;
const repeats = (one) => (withoutRepeats(said(one)).times ? el("small", {}, t("answers.repeats", number(withoutRepeats(said(one)).times))) : "");
const part = (label, ...words) => el("div", { className: "turn" }, el("small", {}, label), ...words);
const card = (heading, prompt, ...parts) => el("article", { className: "card" }, el("small", {}, heading),
  el("div", { className: "prompt" }, String(prompt ?? "").trim()), el("div", { className: "answers" }, parts));

// A row's answer before training and after it, with the words marked in which they differ.
function pair({ of, prompt, answer, before, after }) {
  const as = (one) => (one && said(one) === said(answer) ? ` ✓ ${t("answers.as the row")}` : "");
  const [old, now] = before && after ? differences(brief(before), brief(after)) : [brief(before), brief(after)];
  return card(named(of), prompt, part(t("answers.before") + as(before), old, repeats(before)), after ? part(t("answers.after") + as(after), now, repeats(after)) : null,
    after && as(after) ? null : part(t("answers.row"), said(answer)));
}

// A completion, or all turns of a conversation with tools.
function rollout(line) {
  const turns = Array.isArray(line.turns) ? line.turns : [{ role: t("answers.answer"), content: line.completion }];
  const heading = [`${t("answers.reward")} ${number(line.reward)}`, line.length ? t("answers.tokens", number(line.length)) : ""];
  return card(heading.filter(Boolean).join(" · "), line.prompt, el("div", {}, turns.map((turn) => part(turn?.role, String(turn?.content)))));
}

// How many rows of each kind are answered as they stand, after training and before.
function verdict(rows) {
  const right = (of, when) => rows.filter((row) => row.of === of && row[when] && said(row[when]) === said(row.answer)).length;
  return [...new Set(rows.map((row) => row.of))].map((of) =>
    t("answers.verdict", named(of), right(of, "after"), rows.filter((row) => row.of === of).length, right(of, "before"))).join("\n");
}

// Two texts as nodes, the words marked that only one of them has, by their longest common subsequence.
function differences(before, after) {
  const [old, now] = [before, after].map(wordsOf), marked = [[], []];
  const width = now.length + 1, common = old.length * now.length < LONG ? new Uint16Array((old.length + 1) * width) : null; // of the rests
  for (let i = old.length - 1; common && i >= 0; i -= 1) for (let j = now.length - 1; j >= 0; j -= 1) {
    const [here, below] = [i * width + j, (i + 1) * width + j];
    common[here] = old[i] === now[j] ? common[below + 1] + 1 : Math.max(common[below], common[here + 1]);
  }
  const say = (side, tag, word) => {
    const last = marked[side].at(-1);
    if (last?.tag === tag) last.text += word; else marked[side].push({ tag, text: word });
  };
  for (let i = 0, j = 0; i < old.length || j < now.length;) {
    if (common && old[i] === now[j]) {
      say(0, "", old[i++]);
      say(1, "", now[j++]);
    } else if (j === now.length || (i < old.length && (!common || common[(i + 1) * width + j] >= common[i * width + j + 1]))) say(0, "del", old[i++]);
    else say(1, "ins", now[j++]);
  }
  return marked.map((parts) => parts.map(({ tag, text }) => (tag ? el(tag, {}, text) : text)));
}

// Words with the space behind them; of a language that writes none between its words too.
function wordsOf(text) {
  const found = [];
  for (const { segment } of new Intl.Segmenter(undefined, { granularity: "word" }).segment(text)) {
    if (found.length && !segment.trim()) found.push(found.pop() + segment); else found.push(segment);
  }
  return found;
}
