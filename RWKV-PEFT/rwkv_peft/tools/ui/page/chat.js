// Chat: a base and what was trained on it, side by side, at the same prompt and seed.
import { adapterChoice, copyButton, el, flagField, get, pathField, post, recall, remember, repeat, send, tell } from "./lib.js";
import { showMarkdown } from "./markdown.js";
import { showJob } from "./runs.js";

const LEFT = "cut: the page was left";

export async function chatPage(place, about, signal, folder) {
  const runs = await get("/api/runs").catch(() => []);
  const last = recall("chat", null), run = runs.find((one) => one.folder === folder) ?? (last ? null : runs[0]);
  const kept = { ...last, ...(run ? { model: run.flags.load_model, adapter: "", other: "", state: "", tokenizer: run.flags.tokenizer ?? "" } : {}) };
  const model = pathField("model", "Model", { value: kept.model ?? "", endings: [".pth"] });
  const adapter = pathField("adapter", "Adapter", { value: kept.adapter ?? "", endings: [".safetensors", ".pth"], help: "answers beside the model; may stay empty" });
  const which = adapterChoice((file) => {
    if (file.endsWith(".pth")) model.input.value = file; else adapter.input.value = file; // --peft none trains the model itself
  });
  const other = pathField("other-adapter", "Another adapter", { value: kept.other ?? "", endings: [".safetensors", ".pth"], help: "answers beside both; may stay empty" });
  const state = pathField("state", "State", { value: kept.state ?? "", endings: [".pth", ".safetensors"], help: "a tuned state; may stay empty" });
  const flags = Object.fromEntries(about.chat.map(({ flag }) => [flag, kept[flag] ?? ""]));
  const more = about.chat.map((made) => flagField(made, made.flag[0].toUpperCase() + made.flag.slice(1), flags[made.flag], (value) => { flags[made.flag] = value; }));
  const error = el("div"), status = el("div"), talk = el("div"), running = el("ul", { className: "list" });
  let used = "", loading = null;
  const open = el("button", { type: "button", className: "main", onclick: begin }, "Open");
  place.append(el("h1", {}, "Chat"), el("p", { className: "lead" },
    "Open a model, alone or with what you trained on it. Each answers the same message with the same seed."),
  el("div", { className: "fields" }, model.box, adapter.box, which.box, other.box, state.box, more),
  el("div", { className: "row" }, open), running, error, status, talk);
  const files = run ? await which.show(run.folder) : [adapter.input.value || model.input.value];
  const has = (job) => files.find((file) => job.words.includes(file) || job.words.includes(`adapter=${file}`));
  const served = (await list()).find((job) => !folder || (has(job) && !(run?.modified > job.began))); // opened after the run had written
  if (served && run && has(served)) which.choose(has(served));
  if (served) enter(served.id);
  repeat(signal, 3, list);

  // Lists the models that are open, each with its memory, until someone closes them.
  async function list() {
    const jobs = (await get("/api/jobs").catch(() => [])).filter((job) => job.own && job.words[0] === "serve" && job.state === "running");
    const open = jobs.map((job) => job.id).join();
    if (running.dataset.open === open) return jobs;
    running.dataset.open = open;
    running.replaceChildren(...jobs.map((job) => el("li", {}, el("span", {}, `open: ${job.words.filter((word) => /\.(pth|safetensors)$/.test(word)).join(", ")}`),
      el("button", { type: "button", onclick: () => enter(job.id) }, "Use"), el("button", { type: "button", onclick: () => close(job.id) }, "Close"))));
    return jobs;
  }

  async function close(id) {
    try {
      await post(`/api/jobs/${id}/stop`);
      if (id === used) talk.replaceChildren();
    } catch (problem) {
      tell(error, problem);
    }
  }

  async function begin() {
    const asked = { model: model.input.value.trim(), adapter: adapter.input.value.trim(), other: other.input.value.trim(), state: state.input.value.trim(), ...flags };
    remember("chat", asked);
    tell(error, null);
    open.disabled = true;
    try {
      if (!asked.model) throw new Error("name a model first");
      enter((await post("/api/chat", asked)).id);
    } catch (problem) {
      tell(error, problem);
    }
    open.disabled = false;
  }

  function enter(id) {
    used = id;
    talk.replaceChildren();
    status.replaceChildren(el("p", { className: "note" }, "loading the model …"));
    loading?.abort();
    const leave = (loading = new AbortController());
    signal.addEventListener("abort", () => leave.abort());
    repeat(leave.signal, 1, async () => {
      const job = await get(`/api/jobs/${id}`).catch((problem) => ({ state: "lost", problem }));
      if (job.state !== "running") {
        leave.abort();
        status.replaceChildren();
        return showJob(status, id, signal);
      }
      const models = await get(`/api/chat/${id}/v1/models`).catch(() => null);
      if (!models || leave.signal.aborted) return;
      leave.abort();
      status.replaceChildren(...[...(job.output ?? "").matchAll(/^note: .*$/gm)].map(([line]) => el("p", { className: "note" }, line)));
      draw(job, models.data.map((one) => one.id));
    });
  }

  function draw({ id, began, words }, names) {
    const fileOf = (name) => words.find((word) => word.startsWith(`${name}=`))?.slice(name.length + 1) ?? words[words.indexOf("--model") + 1];
    const option = (name, label, value, step) => {
      const input = el("input", { id: name, type: "number", min: 0, step, value });
      return { input, box: el("div", {}, el("label", { htmlFor: name }, label), input) };
    };
    const temperature = option("temperature", "Temperature", 1, 0.1), top_p = option("top_p", "Top p", 0.5, 0.05);
    const tokens = option("tokens", "Longest answer, tokens", 1000, 1), seed = option("seed", "Seed", 1, 1);
    const think = el("select", { id: "think" }, el("option", { value: "" }, "as the model does"), el("option", { value: "on" }, "on"), el("option", { value: "off" }, "off"));
    const system = el("input", { id: "system", placeholder: "none" });
    const text = el("textarea", { id: "message", placeholder: "Say something", "aria-label": "message" });
    const options = () => ({
      temperature: Number(temperature.input.value), top_p: Number(top_p.input.value), max_tokens: Number(tokens.input.value), seed: Number(seed.input.value),
      ...(think.value ? { think: think.value } : {}),
    });
    const before = recall("talk", {}), chats = before.began === began ? before.chats : {};
    const columns = names.map((name) => column(id, name, fileOf(name), chats[name] ?? [], options, () => system.value.trim(), told));
    const say = el("button", { className: "main" }, "Send");
    const stop = el("button", { type: "button", hidden: true, onclick: () => columns.forEach((one) => one.stop()) }, "Stop");
    const again = el("button", { type: "button", onclick: () => { seed.input.value = Number(seed.input.value) + 1; columns.forEach((one) => one.again()); } }, "Regenerate");
    const edit = el("button", { type: "button", onclick: () => { text.value = columns.map((one) => one.takeBack())[0] || text.value; text.focus(); } }, "Edit the last");
    const clear = el("button", { type: "button", onclick: () => columns.forEach((one) => one.clear()) }, "New chat");
    const end = el("button", { type: "button", onclick: () => close(id) }, "Close the model");
    const form = el("form", { onsubmit: (event) => {
      event.preventDefault();
      const said = text.value.trim();
      if (!said || say.disabled) return;
      text.value = "";
      columns.forEach((one) => one.say(said));
    } }, text, el("div", { className: "row" }, say, stop, again, edit, clear, end),
    el("details", {}, el("summary", {}, "Sampling"), el("div", { className: "fields" }, temperature.box, top_p.box, tokens.box, seed.box,
      el("div", {}, el("label", { htmlFor: "think" }, "Thinking"), think), el("div", {}, el("label", { htmlFor: "system" }, "System text"), system))));
    text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return; // an input method's Enter ends its word
      event.preventDefault();
      form.requestSubmit();
    });
    talk.replaceChildren(el("div", { className: "chats" }, columns.map((one) => one.box)), form);
    signal.addEventListener("abort", () => columns.forEach((one) => one.stop(LEFT)));
    addEventListener("pagehide", told, { signal });
    columns.forEach((one) => { one.scroll(); one.changed(); });
    text.focus();

    // Hears of each change: what was said is there again after a reload, and nothing is sent in the middle of an answer.
    function told() {
      stop.hidden = !(say.disabled = columns.some((one) => one.busy()));
      remember("talk", { began, chats: Object.fromEntries(columns.map((one, n) => [names[n], one.messages()])) });
    }
  }

  // A chat with one model: messages as {role, content, end}, where end says why an answer is not whole.
  function column(id, name, file, messages, options, system, told) {
    const turns = el("div", { className: "turns", "aria-live": "polite", tabIndex: 0 }), problem = el("div");
    let busy = null;
    // A message without an answer, such as one that was refused, is left out of what follows.
    const answered = () => messages.filter(({ content }, n) => content && (messages[n + 1]?.content ?? true));
    const all = () => [...(system() ? [{ role: "system", content: system() }] : []), ...answered().map(({ role, content }) => ({ role, content }))];
    const copy = copyButton(() => JSON.stringify({ messages: all() }), "Copy as a row");
    const box = el("section", { className: "chat", "aria-label": name }, el("h2", {}, name, el("small", {}, file)), turns, problem, el("div", { className: "row" }, copy));
    const scroll = () => { turns.scrollTop = turns.scrollHeight; };

    function changed() {
      copy.disabled = busy !== null || !answered().length || answered().some(({ end }) => end);
      copy.title = answered().some(({ end }) => end) ? "an answer is not whole, and a row of it would teach to end there" : "";
      told();
    }

    // Shows a turn; -> what replaces its words, of which a thinking is folded, and says how it ended.
    function bubble({ role, content, end }) {
      const thought = el("div", { className: "note" }), folded = el("details", { hidden: true }, el("summary", {}, "thinking"), thought);
      const words = el("div", { className: "words" }), why = el("small");
      turns.append(el("div", { className: `turn ${role}`, dir: "auto" }, el("small", {}, role), folded, words, why));
      const show = (text, ended = null) => {
        const low = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 60;
        const found = role === "assistant" && /^\s*<think>?([^]*?)(?:<\/think>\s*([^]*))?$/.exec(text);
        folded.hidden = !found;
        if (found) thought.textContent = found[1].trim();
        const answer = found ? found[2] ?? "" : text;
        if (role === "assistant") showMarkdown(words, answer, ended !== null); else words.textContent = answer;
        why.textContent = ended;
        if (low) scroll();
      };
      show(content, end ?? "");
      return show;
    }

    async function answer() {
      const mine = (busy = new AbortController()), asked = all(), message = { role: "assistant", content: "", end: LEFT };
      messages.push(message);
      tell(problem, null);
      turns.ariaBusy = "true";
      const show = bubble({ role: "assistant", content: "…" });
      scroll();
      changed();
      let end = "cut: the model was closed", waiting = 0, pause = 0;
      const draw = () => {
        const began = performance.now();
        show(message.content || "…");
        waiting = 0;
        pause = 5 * (performance.now() - began); // most of the time stays for the stream, and for who reads
      };
      try {
        const response = await send(`/api/chat/${id}/v1/chat/completions`, { model: name, messages: asked, stream: true, ...options() }, mine.signal);
        if (!response.ok) {
          const found = await response.json().catch(() => ({}));
          throw new Error(found.error?.message ?? found.error ?? `the server answered ${response.status}`);
        }
        for await (const part of events(response.body, mine.signal)) {
          if (part.error) throw new Error(part.error.message ?? part.error);
          const choice = part.choices?.[0];
          message.content += choice?.delta?.content ?? "";
          if (choice?.finish_reason) end = choice.finish_reason === "length" ? "cut: it reached the longest answer, a number under Sampling" : "";
          waiting ||= setTimeout(draw, Math.max(pause, 30));
        }
      } catch (found) {
        if (!mine.signal.aborted) tell(problem, found);
        end = `cut: ${found.message}`;
      }
      clearTimeout(waiting);
      if (!mine.signal.aborted) message.end = end;
      if (!message.content) message.end = "no answer: this message is left out of what follows";
      show(message.content || "(nothing)", message.end);
      if (busy !== mine) return;
      busy = null;
      turns.ariaBusy = "false";
      changed();
    }

    function stop(why = "stopped") {
      if (!busy) return;
      busy.abort();
      busy = null;
      messages.at(-1).end = why;
    }

    // Takes the last turn of a role away; -> its text, or "" if the last is another's.
    function drop(role) {
      if (messages.at(-1)?.role !== role) return "";
      turns.lastElementChild.remove();
      return messages.pop().content;
    }

    messages.forEach((one) => bubble(one));
    return {
      box, scroll, changed, stop(why) { stop(why); changed(); }, busy: () => busy !== null, messages: () => messages,
      say(text) { messages.push({ role: "user", content: text }); bubble(messages.at(-1)); answer(); },
      again() { stop(); drop("assistant"); if (messages.length) answer(); },
      takeBack() { stop(); drop("assistant"); const text = drop("user"); tell(problem, null); changed(); return text; },
      clear() { stop(); messages = []; turns.replaceChildren(); tell(problem, null); changed(); },
    };
  }
}

// The events of a stream of server-sent events, as objects.
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  signal.addEventListener("abort", () => reader.cancel());
  let rest = "";
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
}
