// Shows Markdown, as models write it, as elements. Nothing of it is read as HTML: tags are text here, a link leads to
// the web or is text, and a picture, which would tell its server who reads, is text too. A hostile text takes time in
// proportion to its length: lines are read once at each depth, marks wait in a stack of bounded height.
import { copyButton, el } from "./lib.js";

const OPEN = 3; // blocks at the end which more text may change
const DEEP = 20; // lists and quotes within each other; marks of a paragraph that wait for their ends
const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,}) *(\S*)/;
const HEADING = /^ {0,3}(#{1,6})(?: (.*))?$/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +(?=\S)|\s*$)/;
const BEGINS = /^ {0,3}(?:[-*+]|1[.)]) +\S/; // a list that needs no blank line before it
const FORMULA = /^ {0,3}(\\\[|\$\$)/; // at the begin of a line
const CLOSES = { "\\(": "\\)", "\\[": "\\]", "$$": "$$" }; // what ends a formula, by what begins it
const WEB = /^(https?|mailto):/i;

// Shows a text in `place`. One that grows is read again from its last blocks only, and all others stay as they are,
// also what is selected in them, until it is shown with `ended`.
export function showMarkdown(place, words, ended) {
  const lines = words.split(/\r\n?|\n/), shown = place.blocks ?? [], settled = ended ? [] : shown.slice(0, -OPEN);
  const blocks = settled.concat(read(lines, settled.at(-1)?.end ?? 0));
  let same = 0;
  while (same < blocks.length && blocks[same].raw === shown[same]?.raw) same += 1;
  while (place.childNodes.length > same) place.lastChild.remove();
  for (const { make } of blocks.slice(same)) place.append(make());
  place.blocks = blocks;
}

// The blocks of lines from `at` on: {raw, end: the line after it, make: () => its node}.
function read(lines, at = 0, depth = 0) {
  const found = [];
  for (;;) {
    while (at < lines.length && !lines[at].trim()) at += 1;
    if (at >= lines.length) return found;
    const [end, make] = block(lines, at, depth);
    found.push({ raw: lines.slice(at, end).join("\n"), end, make });
    at = end;
  }
}

const nodes = (lines, depth) => read(lines, 0, depth).map(({ make }) => make());

// The block that begins at a line -> [the line after it, () => its node].
function block(lines, at, depth) {
  const line = lines[at];
  const until = (goesOn) => {
    let end = at + 1;
    while (end < lines.length && goesOn(lines[end], end)) end += 1;
    return end;
  };
  let found;
  if ((found = FENCE.exec(line))) {
    const [, mark, language] = found;
    const closes = (one) => one.trim().startsWith(mark) && !one.trim().replaceAll(mark[0], "");
    const end = until((one) => !closes(one)), text = lines.slice(at + 1, end).join("\n");
    return [Math.min(end + 1, lines.length), () => el("div", { className: "code" },
      el("pre", { tabIndex: 0, "aria-label": language || "code" }, text), copyButton(() => text))];
  }
  if ((found = HEADING.exec(line))) {
    const [, marks, text = ""] = found;
    return [at + 1, () => el(`h${Math.min(marks.length + 2, 6)}`, {}, inline(text.trim().replace(/ #+$/, "")))];
  }
  if ((found = FORMULA.exec(line))) { // to the line that ends it; no mark within it is one
    const [opening, begin] = found, ends = (one, from = 0) => one.includes(CLOSES[begin], from);
    const end = ends(line, opening.length) ? at + 1 : until((one, n) => one.trim() && (n === at + 1 || !ends(lines[n - 1])));
    return [end, () => el("p", {}, inline(lines.slice(at, end).join("\n")))];
  }
  if (RULE.test(line)) return [at + 1, () => el("hr")];
  if (depth < DEEP && QUOTE.test(line)) {
    const end = until((one) => QUOTE.test(one));
    return [end, () => el("blockquote", {}, nodes(lines.slice(at, end).map((one) => one.replace(QUOTE, "")), depth + 1))];
  }
  if (depth < DEEP && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) {
    const end = until((one) => one.includes("|")), [head, , ...rows] = lines.slice(at, end).map(cells);
    return [end, () => el("div", { className: "scroll" }, el("table", {}, row("th", head), rows.map((one) => row("td", one.slice(0, head.length)))))];
  }
  const end = until((one, n) => one.trim() && !BEGINS.test(one) && !begins(one) && !isTable(lines, n));
  return [end, () => el("p", {}, inline(lines.slice(at, end).join("\n")))];
}

const begins = (line) => [FENCE, HEADING, RULE, QUOTE, FORMULA].some((one) => one.test(line));

// A list: each item has the lines that are deeper than its mark, and those that go on with its last paragraph.
function list(lines, at, depth) {
  const ordered = /\d/.test(ITEM.exec(lines[at])[2]), start = parseInt(ITEM.exec(lines[at])[2]), items = [];
  let end = at;
  for (let mark; (mark = ITEM.exec(lines[end] ?? "")) && /\d/.test(mark[2]) === ordered && !RULE.test(lines[end]);) {
    const [whole, pad] = mark, first = end, deep = new RegExp(`^ {${pad.length + 2}}`), strip = new RegExp(`^ {0,${whole.length}}`);
    const belongs = (one, before) => !one.trim() || deep.test(one) || (before.trim() && !ITEM.test(one) && !begins(one));
    end += 1;
    while (end < lines.length && belongs(lines[end], lines[end - 1])) end += 1;
    const box = { " ": "☐ ", x: "☑ ", X: "☑ " }, text = lines[first].slice(whole.length).replace(/^\[([ xX])\] /, (_, one) => box[one]);
    items.push([text, ...lines.slice(first + 1, end).map((one) => one.replace(strip, ""))]);
  }
  return [end, () => el(ordered ? "ol" : "ul", ordered ? { start } : {}, items.map((one) => el("li", {}, nodes(one, depth + 1))))];
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
const row = (tag, texts) => el("tr", {}, texts.map((text) => el(tag, {}, inline(text))));

function isTable(lines, at) {
  if (!lines[at].includes("|") || !/^[\s|:-]+$/.test(lines[at + 1] ?? "")) return false;
  const below = cells(lines[at + 1]);
  return below.every((cell) => /^:?-+:?$/.test(cell)) && below.length === cells(lines[at]).length;
}

// An escaped character; what begins a formula; a run of marks; the begin of a link or picture; its end, with an address or without; an address.
const TOKEN = /\\[!-/:-@[-`{-~]|\$\$|`+|\*+|_+|~~|!?\[|\](?:\((?:<([^<>\n]{0,2000})>|([^\s<>()]{0,2000}(?:\([^\s<>()]{0,2000}\)[^\s<>()]{0,2000}){0,4}))(?: +"[^"\n]{0,2000}")? ?\))?|<((?:https?|mailto):[^\s<>]{1,2000})>|https?:\/\/[^\s<>]{0,2000}/g;
const TAGS = { "*": "em", "_": "em", "**": "strong", "__": "strong", "~~": "del" };
const link = (href, children) => el("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" }, children);

// The nodes within a block or a cell. Marks that wait for their ends stand in a stack, each with the nodes behind it; one
// that finds no end is text.
function inline(text) {
  const stack = [{ mark: "", at: 0, nodes: [] }], ends = runs(text), open = new Set(); // formulas that nothing ends
  const say = (node) => {
    const { nodes } = stack.at(-1);
    if (node === "") return;
    if (typeof node === "string" && typeof nodes.at(-1) === "string") nodes.push(nodes.pop() + node); else nodes.push(node);
  };
  const fold = (from) => stack.splice(from).forEach(({ mark, nodes }) => [mark, ...nodes].forEach(say));
  const wrap = (at, made) => {
    fold(at + 1);
    say(made(stack.pop().nodes));
  };
  let last = 0;
  const go = (to) => { last = TOKEN.lastIndex = to; };
  go(0);
  for (let found; (found = TOKEN.exec(text));) {
    const [token, quoted, plain, address] = found, { index } = found, first = token[0];
    const before = text[index - 1] ?? " ", after = text[index + token.length] ?? " ";
    say(text.slice(last, index));
    go(index + token.length);
    if (token in CLOSES) { // a formula stays as it is written
      const end = open.has(token) ? -1 : text.indexOf(CLOSES[token], last);
      if (end < 0) open.add(token);
      else go(end + CLOSES[token].length);
      say(text.slice(index, last));
    } else if (first === "\\") say(/[)\]]/.test(token[1]) ? token : token[1]);
    else if (first === "`") {
      const end = ends(token.length, index);
      if (end < 0) say(token);
      else {
        const code = text.slice(last, end).replaceAll("\n", " ");
        say(el("code", {}, code.startsWith(" ") && code.endsWith(" ") && code.trim() ? code.slice(1, -1) : code));
        go(end + token.length);
      }
    } else if (first === "*" || first === "_" || first === "~") {
      const inWord = (one) => first === "_" && /[\p{L}\p{N}]/u.test(one);
      let left = token.length;
      const closed = () => {
        const same = stack.findLastIndex(({ mark }) => mark === first.repeat(left));
        return same > 0 ? same : stack.findLastIndex(({ mark }) => mark[0] === first && mark.length <= left);
      };
      for (let at; left && /\S/.test(before) && !inWord(after) && (at = closed()) > 0;) {
        const { mark } = stack[at];
        wrap(at, (nodes) => el(TAGS[mark], {}, nodes));
        left -= mark.length;
      }
      const opens = left && left <= 3 && /\S/.test(after) && !inWord(before) && stack.length < DEEP;
      if (!opens) say(first.repeat(left));
      else for (const size of left === 3 ? [2, 1] : [left]) stack.push({ mark: first.repeat(size), at: index, nodes: [] });
    } else if (token.endsWith("[")) {
      if (stack.length < DEEP) stack.push({ mark: token, at: index, nodes: [] }); else say(token);
    } else if (first === "]") {
      const at = stack.findLastIndex(({ mark }) => mark.endsWith("[")), href = quoted ?? plain;
      if (at > 0 && href !== undefined && stack[at].mark === "[" && WEB.test(href)) wrap(at, (nodes) => link(href, nodes));
      else if (at > 0 && href !== undefined) say(text.slice(stack.splice(at)[0].at, last)); // a picture, or no address of the web
      else {
        if (at > 0) fold(at);
        say(token);
      }
    } else if (address) say(link(address, [address]));
    else if (/[\w"'=]/.test(before)) say(token);
    else {
      let size = token.length;
      while (/[.,:;!?"')\]*_~`，。；：！？）]/.test(token[size - 1])) size -= 1;
      const href = token.slice(0, size);
      say(/\/\/./.test(href) ? link(href, [href]) : href);
      go(index + size);
    }
  }
  say(text.slice(last));
  fold(1);
  return stack[0].nodes;
}

// -> (length, from) => where the next run of so many backticks is after `from`, or -1; asked with growing `from`.
function runs(text) {
  const places = new Map();
  for (const { 0: { length }, index } of text.matchAll(/`+/g)) {
    if (!places.has(length)) places.set(length, { next: 0, all: [] });
    places.get(length).all.push(index);
  }
  return (length, from) => {
    const found = places.get(length);
    if (!found) return -1; // a run that an escaped backtick begins
    while (found.all[found.next] <= from) found.next += 1;
    return found.all[found.next] ?? -1;
  };
}
