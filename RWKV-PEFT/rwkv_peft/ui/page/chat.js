// Chat: a base and what was trained on it, side by side, at the same prompt and seed.
import { copyButton, el, flagField, get, pathField, post, recall, remember, repeat, send, tell } from "./lib.js";
import { showJob } from "./runs.js";

export async function chatPage(place, about, signal, folder) {
  const runs = await get("/api/runs").catch(() => []);
  const last = recall("chat", null), run = runs.find((one) => one.folder === folder) ?? (last ? null : runs[0]);
  const kept = { ...last, ...(run ? { model: run.flags.load_model, adapter: `${run.folder}/adapter.safetensors`, tokenizer: run.flags.tokenizer ?? "" } : {}) };
  const model = pathField("model", "Model", { value: kept.model ?? "", endings: [".pth"] });
  const adapter = pathField("adapter", "Adapter", { value: kept.adapter ?? "", endings: [".safetensors", ".pth"], help: "answers beside the model; may stay empty" });
  const state = pathField("state", "State", { value: kept.state ?? "", endings: [".pth", ".safetensors"], help: "a tuned state; may stay empty" });
  const flags = Object.fromEntries(about.chat.map(({ flag }) => [flag, kept[flag] ?? ""]));
  const more = about.chat.map((made) => flagField(made, made.flag[0].toUpperCase() + made.flag.slice(1), flags[made.flag], (value) => { flags[made.flag] = value; }));
  const error = el("div"), status = el("div"), talk = el("div"), running = el("ul", { className: "list" });
  let used = "", loading = null;
  const open = el("button", { type: "button", className: "main", onclick: begin }, "Open");
  place.append(el("h1", {}, "Chat"), el("p", { className: "lead" },
    "Open a model, alone or with what you trained on it. Each answers the same message with the same seed."),
  el("div", { className: "fields" }, model.box, adapter.box, state.box, more),
  el("div", { className: "row" }, open), running, error, status, talk);
  const served = await list();
  if (served.length && !folder) enter(served[0].id);
  repeat(signal, 3, list);

  // Lists the models that are open, each with its memory, until someone closes them.
  async function list() {
    const jobs = (await get("/api/jobs").catch(() => [])).filter((job) => job.words[0] === "serve" && job.state === "running");
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
    const asked = { model: model.input.value.trim(), adapter: adapter.input.value.trim(), state: state.input.value.trim(), ...flags };
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
      status.replaceChildren();
      draw(id, models.data.map((one) => one.id));
    });
  }

  function draw(id, names) {
    const option = (name, label, value, step) => {
      const input = el("input", { id: name, type: "number", min: 0, step, value });
      return { input, box: el("div", {}, el("label", { htmlFor: name }, label), input) };
    };
    const temperature = option("temperature", "Temperature", 1, 0.1), top_p = option("top_p", "Top p", 0.5, 0.05);
    const tokens = option("tokens", "Longest answer, tokens", 200, 1), seed = option("seed", "Seed", 1, 1);
    const system = el("input", { id: "system", placeholder: "none" });
    const text = el("textarea", { id: "message", placeholder: "Say something", "aria-label": "message" });
    const columns = names.map((name) => column(id, name, () => ({
      temperature: Number(temperature.input.value), top_p: Number(top_p.input.value), max_tokens: Number(tokens.input.value), seed: Number(seed.input.value),
    }), () => system.value.trim()));
    const say = el("button", { className: "main" }, "Send");
    const again = el("button", { type: "button", onclick: () => { seed.input.value = Number(seed.input.value) + 1; columns.forEach((one) => one.again()); } }, "Regenerate");
    const clear = el("button", { type: "button", onclick: () => columns.forEach((one) => one.clear()) }, "New chat");
    const end = el("button", { type: "button", onclick: () => close(id) }, "Close the model");
    const form = el("form", { onsubmit: (event) => {
      event.preventDefault();
      const said = text.value.trim();
      if (!said) return;
      text.value = "";
      columns.forEach((one) => one.say(said));
    } }, text, el("div", { className: "row" }, say, again, clear, end),
    el("details", {}, el("summary", {}, "Sampling"), el("div", { className: "fields" }, temperature.box, top_p.box, tokens.box, seed.box,
      el("div", {}, el("label", { htmlFor: "system" }, "System text"), system))));
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
    });
    talk.replaceChildren(el("div", { className: "chats" }, columns.map((one) => one.box)), form);
    text.focus();
  }

  function column(id, name, options, system) {
    const turns = el("div", { "aria-live": "polite" }), problem = el("div");
    let messages = [], busy = null;
    const rows = () => JSON.stringify({ messages: [...(system() ? [{ role: "system", content: system() }] : []), ...messages] });
    const box = el("section", { className: "chat", "aria-label": name }, el("h2", {}, name), turns, problem,
      el("div", { className: "row" }, copyButton(rows, "Copy as a row")));

    const bubble = (role, text) => {
      const body = el("span", {}, text);
      turns.append(el("div", { className: `turn ${role}` }, el("small", {}, role), body));
      return body;
    };

    async function answer() {
      busy?.abort();
      busy = new AbortController();
      tell(problem, null);
      const body = bubble("assistant", "…"), said = [];
      try {
        const full = [...(system() ? [{ role: "system", content: system() }] : []), ...messages];
        const response = await send(`/api/chat/${id}/v1/chat/completions`, { model: name, messages: full, stream: true, ...options() });
        if (!response.ok) {
          const found = await response.json().catch(() => ({}));
          throw new Error(found.error?.message ?? found.error ?? `the server answered ${response.status}`);
        }
        for await (const part of events(response.body, busy.signal)) {
          if (part.error) throw new Error(part.error.message ?? part.error);
          said.push(part.choices?.[0]?.delta?.content ?? "");
          body.textContent = said.join("");
        }
        messages.push({ role: "assistant", content: said.join("") });
      } catch (found) {
        if (!busy.signal.aborted) tell(problem, found);
      }
      if (!said.join("")) body.textContent = "(nothing)";
    }

    return {
      box,
      say(text) { messages.push({ role: "user", content: text }); bubble("user", text); answer(); },
      again() {
        if (messages.at(-1)?.role === "assistant") messages.pop();
        if (!messages.length) return;
        turns.lastElementChild.remove();
        answer();
      },
      clear() { busy?.abort(); messages = []; turns.replaceChildren(); tell(problem, null); },
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
