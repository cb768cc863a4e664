// A conversation with several models at once: each message stands once, below it the answers of the models side by side.
import { el, number, post, send, tell, withoutRepeats } from "./lib.js";
import { showMarkdown } from "./markdown.js";
import { t } from "./texts.js";
import { addRow } from "./write.js";

const NEAR = 30; // pixels from the end of a box, within which it follows its answer

// Shows the conversation of `turns` in `box`, and asks `models` {name: title} at an address for further answers.
//
// turns: [{text, answers: {name: {content, thought, tokens: of the thought, end: why it is not whole, id: its response's,
// said: what somebody has said of it}}}]; asked(name): the fields of a request besides its messages; system(): the system
// text; changed() is called after each change.
export function talk(box, address, models, turns, { asked, system, changed }) {
  const running = new Map(); // an answer that comes -> the controller that stops it
  const first = () => (system() ? [{ role: "system", content: system() }] : []);
  const answered = (name, end) => turns.slice(0, end).filter(({ answers }) => answers[name]?.content);

  // The messages of the turns before `end` that a model has answered: one that was refused is left out of what follows.
  function history(name, end, thoughts = false) {
    return [...first(), ...answered(name, end).flatMap(({ text, answers: { [name]: { content, thought } } }) => [
      { role: "user", content: text },
      { role: "assistant", content, ...(thoughts && thought ? { reasoning_content: thought } : {}) },
    ])];
  }

  function refresh() {
    box.ariaBusy = String(running.size > 0);
    changed();
  }

  function draw(turn) {
    const place = el("div", { className: "answers" });
    box.append(el("section", {}, el("div", { className: "turn user", dir: "auto" }, el("div", { className: "words" }, turn.text)), place));
    return place;
  }

  // Adds an answer -> the function that shows it again; `ended` if nothing more of it comes.
  function add(place, turn, name) {
    const message = turn.answers[name], end = turns.indexOf(turn) + 1;
    const thought = el("div", { className: "note" }), summary = el("summary"), folded = el("details", {}, summary, thought);
    const words = el("div", { className: "words" }), why = el("small"), problem = el("div");
    const copy = el("button", { type: "button", onclick: () => addRow(history(name, end, true)).then(() => {
      copy.textContent = t("chat.added");
      copy.disabled = true;
    }, (found) => tell(problem, found)) }, t("chat.add"));
    const noted = el("small", { role: "status" }), better = el("textarea", { "aria-label": t("chat.better") });
    const judge = (body, said) => post(address.replace("chat/completions", "feedback"), { id: message.id, ...body }).then(() => {
      if (body.text) Object.assign(message, { content: body.text.trim(), thought: "", end: "" }); // the chat goes on from it
      message.said = said;
      editor.hidden = true;
      tell(problem, null);
      show(true);
      changed();
    }, (found) => tell(problem, found));
    const marks = ["good", "bad"].map((mark) => el("button", { type: "button", onclick: () => judge({ mark }, mark) }, t(`chat.${mark}`)));
    const fix = el("button", { type: "button", onclick: () => { better.value = message.content; editor.hidden = false; better.focus(); } }, t("chat.fix"));
    const editor = el("form", { hidden: true, onsubmit: (event) => { event.preventDefault(); judge({ text: better.value }, "fix"); } }, better,
      el("div", { className: "row" }, el("button", { className: "main" }, t("chat.fix.save")), el("button", { type: "button", onclick: () => { editor.hidden = true; fix.focus(); } }, t("cancel"))));
    place.append(el("article", { className: "turn assistant", dir: "auto", "aria-label": models[name] },
      el("small", {}, models[name]), folded, words, editor, problem, el("div", { className: "row" }, why, marks, fix, copy, noted)));
    const show = (ended) => {
      const low = words.scrollHeight - words.scrollTop - words.clientHeight < NEAR;
      folded.hidden = !message.thought;
      thought.textContent = message.thought;
      summary.textContent = t(message.content || ended ? "chat.thought" : "chat.thinking", number(message.tokens));
      showMarkdown(words, message.content || (ended || message.thought ? "" : "…"), ended);
      why.textContent = ended ? message.end : "";
      const whole = answered(name, end).every(({ answers }) => !answers[name].end);
      copy.hidden = !ended || !message.content;
      for (const one of [...marks, fix]) one.hidden = copy.hidden || !message.id;
      marks[0].disabled = message.end || message.said === "fix"; // a mark is of what the model said
      marks[1].disabled = message.said === "fix";
      noted.textContent = message.said ? t("chat.noted", t(`chat.${message.said}`)) : "";
      copy.disabled = !whole;
      copy.title = whole ? "" : t("chat.not whole");
      if (low && !ended) words.scrollTop = words.scrollHeight;
    };
    return { show, problem };
  }

  async function answer(place, turn, name) {
    const message = (turn.answers[name] = { content: "", thought: "", tokens: 0, end: t("chat.left") }), control = new AbortController();
    const { show, problem } = add(place, turn, name), messages = [...history(name, turns.indexOf(turn)), { role: "user", content: turn.text }];
    let end = t("chat.closed"), waiting = 0, pause = 0;
    const draw = () => {
      const began = performance.now();
      show(false);
      waiting = 0;
      pause = 5 * (performance.now() - began); // most of the time stays for the stream, and for who reads
    };
    running.set(message, control);
    draw();
    refresh();
    try {
      const response = await send(address, { model: name, messages, stream: true, stream_options: { include_usage: true }, ...asked(name) }, control.signal);
      if (!response.ok) {
        const found = await response.json().catch(() => ({}));
        throw new Error(found.error?.message ?? found.error ?? t("chat.status", response.status));
      }
      for await (const { id, choices, usage, error } of events(response.body, control.signal)) {
        if (error) throw new Error(error.message ?? error);
        message.id ??= id;
        const { delta = {}, finish_reason } = choices?.[0] ?? {};
        message.content += delta.content ?? "";
        message.thought += delta.reasoning_content ?? "";
        message.tokens = usage?.completion_tokens_details.reasoning_tokens ?? message.tokens + Boolean(delta.reasoning_content);
        const { text, times } = withoutRepeats(message.content);
        if (times) {
          message.content = text;
          end = t("chat.repeats", number(times));
          break; // it would go on so
        }
        if (finish_reason) end = finish_reason === "length" ? t("chat.longest") : "";
        waiting ||= setTimeout(draw, Math.max(pause, 30));
      }
    } catch (found) {
      if (!control.signal.aborted) tell(problem, found);
      end = message.content ? t("chat.cut", found.message) : "";
    }
    clearTimeout(waiting);
    if (running.delete(message)) message.end = end; // else stop() has said why
    if (!message.content) message.end = [message.end, t("chat.unanswered")].filter(Boolean).join("; ");
    show(true);
    refresh();
  }

  function stop(why = t("chat.stopped")) {
    for (const [message, control] of running) {
      message.end = why;
      control.abort();
    }
    running.clear();
    refresh();
  }

  function ask(turn) {
    const place = draw(turn);
    turn.answers = {};
    for (const name of Object.keys(models)) answer(place, turn, name);
    place.parentElement.scrollIntoView(); // the message is at the top, and below it all answers
  }

  // Takes the last turn away; -> it, or undefined.
  function drop() {
    stop();
    box.lastElementChild?.remove();
    return turns.pop();
  }

  function say(text) {
    turns.push({ text, answers: {} });
    ask(turns.at(-1));
  }

  for (const turn of turns) {
    const place = draw(turn);
    for (const name of Object.keys(models)) if (turn.answers[name]) add(place, turn, name).show(true);
  }
  box.ariaBusy = "false";
  return {
    stop, say, busy: () => running.size > 0, turns: () => turns,
    again() { const turn = drop(); if (turn) say(turn.text); },
    takeBack() { const turn = drop(); refresh(); return turn?.text ?? ""; },
    clear() { stop(); turns = []; box.replaceChildren(); refresh(); },
  };
}

// The events of a stream of server-sent events, as objects.
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  signal.addEventListener("abort", () => reader.cancel());
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // who asked may have heard enough
  }
}
