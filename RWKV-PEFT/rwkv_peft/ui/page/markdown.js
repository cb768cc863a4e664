// Shows Markdown, as models write it, as elements. Nothing of it is read as HTML: what Markdown takes for HTML is text
// here, a link leads to the web or is text, and a picture, which would tell its server who reads, is text too.
import { Lexer } from "./vendor/marked.esm.js";
import { copyButton, el } from "./lib.js";

const MOST = 30_000; // characters that are read at once: a hostile text can take time that grows with their square
const OPEN = 3; // blocks at the end which more text may change
const WEB = /^(https?|mailto):/i;

// Shows a text in `place`. One that grows is read again from its last blocks only, and all others stay as they are,
// also what is selected in them, until it is shown with `ended`.
export function showMarkdown(place, words, ended) {
  const text = words.replace(/\r\n?/g, "\n"), shown = place.blocks ?? [];
  const settled = ended && text.length <= MOST ? [] : shown.slice(0, -OPEN);
  const blocks = [...settled, ...read(text.slice(settled.reduce((sum, { raw }) => sum + raw.length, 0)))];
  let same = 0;
  while (same < blocks.length && blocks[same].raw === shown[same]?.raw) same += 1;
  while (place.childNodes.length > same) place.lastChild.remove();
  place.append(...blocks.slice(same).map(block));
  place.blocks = blocks;
}

function read(text) {
  try {
    if (text.length <= MOST) return Lexer.lex(text);
  } catch { /* quotes within quotes, beyond what the browser's stack holds */ }
  return [{ type: "text", raw: text, text }];
}

// One node for each block.
function block(token) {
  switch (token.type) {
    case "space": case "def": return "";
    case "heading": return el(`h${Math.min(token.depth + 2, 6)}`, {}, inline(token));
    case "paragraph": return el("p", {}, inline(token));
    case "blockquote": return el("blockquote", {}, token.tokens.map(block));
    case "hr": return el("hr");
    case "code": return el("div", { className: "code" }, el("pre", { tabIndex: 0, "aria-label": token.lang || "code" }, token.text), copyButton(() => token.text));
    case "list": return el(token.ordered ? "ol" : "ul", token.ordered ? { start: token.start } : {}, token.items.map((item) => el("li", {}, item.tokens.map(block))));
    case "checkbox": return token.checked ? "☑ " : "☐ ";
    case "table": return el("div", { className: "scroll" }, el("table", {}, row("th", token.header), token.rows.map((cells) => row("td", cells))));
    case "text": return el("span", {}, inline(token));
    default: return el("p", {}, token.raw);
  }
}

const row = (tag, cells) => el("tr", {}, cells.map((cell) => el(tag, {}, inline(cell))));

// The nodes within a block or a cell.
function inline(token) {
  if (!token.tokens) return [token.text ?? token.raw];
  return token.tokens.flatMap((part) => {
    switch (part.type) {
      case "strong": case "em": case "del": return el(part.type, {}, inline(part));
      case "codespan": return el("code", {}, part.text);
      case "br": return el("br");
      case "link": return WEB.test(part.href) ? el("a", { href: part.href, title: part.href, target: "_blank", rel: "noopener noreferrer" }, inline(part)) : part.raw;
      case "text": return inline(part);
      case "checkbox": return block(part);
      case "escape": return /[()[\]]/.test(part.text) ? part.raw : part.text; // of a formula
      default: return part.raw;
    }
  });
}
