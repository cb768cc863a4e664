// Rows that somebody writes here: a question and an answer, more turns, a system text, or a whole chat that is pasted.
import { el, folded, get, number, post, tell } from "./lib.js";
import { t } from "./texts.js";

const LISTED = 8; // rows
const SPEAKERS = { // who speaks in a pasted chat, by the word before its colon
  user: ["user", "human", "me", "you", "question", "q", "prompt", "用户", "我", "问", "问题", "人类"],
  assistant: ["assistant", "bot", "ai", "model", "answer", "a", "gpt", "chatgpt", "rwkv", "response", "助手", "机器人", "答", "回答", "模型"],
  system: ["system", "系统"],
};
const SPEAKER = new RegExp(`^[ \\t>*#]*(${Object.values(SPEAKERS).flat().join("|")})[*]*[ \\t]*[:：][*]*[ \\t]?(.*)$`, "iu");
const roleOf = (name) => Object.keys(SPEAKERS).find((role) => SPEAKERS[role].includes(name.toLowerCase()));

// The conversations of a text of lines such as "User: …" and "Assistant: …"; a line of --- or === begins another one.
// Words before the first speaker make it no conversation.
export function conversations(text) {
  return text.split(/^[ \t]*[-=]{3,}[ \t]*$/m).map((part) => {
    const turns = [];
    for (const line of part.split(/\r?\n/)) {
      const [, name, words] = SPEAKER.exec(line) ?? [];
      if (name) turns.push({ role: roleOf(name), content: words });
      else if (turns.length) turns.at(-1).content += `\n${line}`;
      else if (line.trim()) return [];
    }
    return turns.map(({ role, content }) => ({ role, content: content.trim() })).filter(({ content }) => content);
  }).filter((turns) => turns.some(({ role }) => role === "user") && turns.at(-1).role === "assistant");
}

export const addRow = (messages, path) => post("/api/rows", { messages, ...(path ? { path } : {}) });

// The rows of `path` with a form to write others; changed(path) is called after each change.
export async function rowWriter(path, mine, changed) {
  let file = path, found = await get("/api/rows", { path }).catch(() => null), edited = null, most = LISTED;
  if (!found || (!found.rows.length && found.others)) found = await get("/api/rows", { path: (file = mine) });
  const list = el("ul", { className: "list" }), turns = el("div", { className: "fields turns-of" }), error = el("div"), title = el("p", { className: "note" });
  const system = el("textarea", { id: "row-system", placeholder: t("write.system.none") });
  const pasted = el("textarea", { id: "row-paste", placeholder: t("write.paste.example") });
  const save = el("button", { className: "main" }), cancel = el("button", { type: "button", onclick: () => begin(null) }, t("cancel"));
  const form = el("form", { onsubmit: submit }, turns, folded(t("write.system"), el("label", { htmlFor: "row-system" }, t("write.system")), system),
    el("div", { className: "row" }, save, el("button", { type: "button", onclick: () => grow().focus() }, t("write.more")), cancel),
    folded(t("write.paste"), el("label", { htmlFor: "row-paste" }, t("write.paste.label")), pasted, el("div", { className: "row" }, el("button", { type: "button", onclick: paste }, t("write.paste.take")))), error);
  begin(null);
  draw();
  return el("section", { className: "panel", "aria-label": t("write.title") }, el("h2", {}, t("write.title")), title, form, list);

  // A box for what a role says, and its label.
  function box(role, n, value) {
    const id = `row-${role}-${n}`, area = el("textarea", { id, value });
    area.dataset.role = role;
    turns.append(el("div", {}, el("label", { htmlFor: id }, n > 1 ? t(`write.${role} n`, n) : t(`write.${role}`)), area));
    return area;
  }

  function grow(question = "", answer = "") {
    const n = turns.childElementCount / 2 + 1, area = box("user", n, question);
    box("assistant", n, answer);
    return area;
  }

  // Puts a row, or none, into the form.
  function begin(row) {
    edited = row;
    turns.replaceChildren();
    const said = row?.messages ?? [], first = said[0]?.role === "system" ? 1 : 0;
    system.value = first ? said[0].content : "";
    if (system.value) system.closest("details").open = true;
    for (let n = first; n < said.length; n += 2) grow(said[n].content, said[n + 1]?.content);
    if (!turns.childElementCount) grow();
    save.textContent = t(row ? "write.save" : "write.add");
    cancel.hidden = !row;
    tell(error, null);
  }

  async function put(change) {
    try {
      found = await post("/api/rows", { path: file, ...change });
      begin(null);
      draw();
      changed(file);
      return true;
    } catch (problem) {
      tell(error, problem);
      return false;
    }
  }

  function submit(event) {
    event.preventDefault();
    const said = [...turns.querySelectorAll("textarea")].map((area) => ({ role: area.dataset.role, content: area.value.trim() }));
    while (said.length > 2 && !said.at(-1).content && !said.at(-2).content) said.splice(-2);
    if (said.some(({ content }) => !content)) return tell(error, t("write.first"));
    const messages = [...(system.value.trim() ? [{ role: "system", content: system.value.trim() }] : []), ...said];
    put({ messages, ...(edited ? { number: edited.number, was: edited.messages } : {}) });
  }

  async function paste() {
    const chats = conversations(pasted.value);
    if (!chats.length) return tell(error, t("write.paste.none"));
    for (const messages of chats) if (!await put({ messages })) return;
    pasted.value = "";
  }

  function draw() {
    const { rows, others } = found;
    title.textContent = [rows.length ? t("write.in", number(rows.length), file) : t("write.into", file), others ? t("write.others", number(others)) : ""].filter(Boolean).join(" ");
    const plain = ({ messages }) => messages.every(({ role, reasoning_content }, n) => !reasoning_content && (role === "system" ? n === 0 : (role === "user") === ((n - (messages[0].role === "system")) % 2 === 0)));
    list.replaceChildren(...rows.toReversed().slice(0, most).map((row) => el("li", {},
      el("span", {}, short(row.messages.find(({ role }) => role === "user")?.content), el("br"), el("small", { className: "state" }, short(row.messages.at(-1).content))),
      plain(row) ? el("button", { type: "button", onclick: () => { begin(row); turns.querySelector("textarea").focus(); } }, t("write.edit")) : "",
      el("button", { type: "button", onclick: () => put({ number: row.number, was: row.messages }) }, t("write.delete")))),
    rows.length > most ? el("li", {}, el("button", { type: "button", onclick: () => { most = Infinity; draw(); } }, t("write.all", number(rows.length)))) : "");
  }
}

const short = (text = "") => (text.length > 120 ? `${text.slice(0, 120)}…` : text);

// Offers to make rows of a text file if it is a chat; -> an element, or "".
export async function chatOffer(path, mine, made) {
  const text = await fetch(`/api/download?${new URLSearchParams({ path })}`).then((got) => (got.ok && got.headers.get("content-length") < 4e6 ? got.text() : "")).catch(() => "");
  const chats = conversations(text), turns = chats.flat().length, error = el("div");
  if (!chats.length) return "";
  const take = async ({ target }) => {
    target.disabled = true;
    try {
      for (const messages of chats) await addRow(messages);
      made(mine);
    } catch (problem) {
      tell(error, problem);
    }
  };
  return el("section", { className: "panel" }, el("p", {}, t("write.chat", path, number(turns))), el("button", { type: "button", onclick: take }, t("write.chat.take")), error);
}
