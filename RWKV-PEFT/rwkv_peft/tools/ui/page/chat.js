// Chat: a conversation with a base and what was trained on it, at the same seed. Models, and how they answer, are in a drawer.
import { showJob } from "./job.js";
import { adapterChoice, el, flagField, folded, get, helpLine, pathField, post, recall, remember, repeat, settings, tell } from "./lib.js";
import { talk } from "./talk.js";
import { t } from "./texts.js";

const TRAINED = /\.(safetensors|pth)$/;
const LONGEST = 1000, STEPS = { max_tokens: 1, temperature: 0.1, top_p: 0.05, seed: 1 }; // of the fields of numbers
const short = (file) => file.replace(/(\/adapter)?\.(safetensors|pth)$/, "");

export async function chatPage(place, about, signal, folder) {
  const runs = await get("/api/runs").catch(() => []), last = recall("chat", null), newest = runs.find((one) => one.files.some((file) => TRAINED.test(file)));
  const run = runs.find((one) => one.folder === folder) ?? (last?.at > newest?.modified ? null : newest);
  const kept = run ? { ...last, model: run.flags.load_model, adapters: [], state: "", tokenizer: run.flags.tokenizer } : { model: settings().load_model, tokenizer: settings().tokenizer, ...last };

  const model = pathField("model", t("chat.model"), { value: kept.model ?? "", endings: [".pth"] });
  const adapters = el("div", { className: "fields" });
  const which = adapterChoice((file) => {
    (file.endsWith(".pth") ? model.input : adapters.querySelector("input")).value = file; // --peft none trains the model itself
    update();
  });
  const state = pathField("state", t("chat.state"), { value: kept.state ?? "", endings: [".pth", ".safetensors"], help: t("chat.state.help") });
  const flags = Object.fromEntries(about.chat.map(({ flag }) => [flag, kept[flag] ?? ""]));
  const further = about.chat.map((made) => flagField(made, t(`chat.${made.flag}`), flags[made.flag], (value) => { flags[made.flag] = value; }));
  const opened = el("ul", { className: "list" }), error = el("div"), status = el("div", { "aria-live": "polite" }), box = el("div", { className: "turns", role: "log", "aria-label": t("chat.log") });

  const sampling = { ...recall("sampling", {}) };
  const inputs = {
    think: el("select", { id: "think" }, ["", ...about.think].map((value) => el("option", { value, selected: value === sampling.think }, t(`think.${value}`)))),
    system: el("input", { id: "system", placeholder: t("chat.system.none"), value: sampling.system ?? "" }),
  };
  const longest = Number((run ?? newest)?.flags.ctx_len) || LONGEST; // the rows', which the answers are like
  const usual = { ...about.sampling, max_tokens: Math.min(longest, LONGEST), seed: 1 };
  for (const [name, step] of Object.entries(STEPS)) inputs[name] = el("input", { id: name, type: "number", min: 0, step, value: sampling[name] ?? usual[name] });
  const scales = el("div", { className: "fields" });
  const sampled = (...names) => el("div", { className: "fields" }, names.map((name) =>
    el("div", {}, el("label", { htmlFor: inputs[name].id }, t(`chat.${name}`)), inputs[name], helpLine(inputs[name], t(`chat.${name}.help`)))));
  const drawer = el("details", { className: "drawer", oninput: update }, el("summary", {}, t("chat.drawer")),
    el("h2", {}, t("chat.models")), opened, el("div", { className: "fields" }, model.box, which.box), adapters,
    el("div", { className: "row" }, el("button", { type: "button", onclick: () => addAdapter("").focus() }, t("chat.another"))),
    folded(t("chat.more models"), el("div", { className: "fields" }, state.box, further)),
    el("div", { className: "row" }, el("button", { type: "button", className: "main", onclick: begin }, t("chat.open"))),
    el("h2", {}, t("chat.answers")), sampled("system", "max_tokens", "think"), folded(t("more"), sampled("temperature", "top_p", "seed")), scales);

  const proposal = el("button", { type: "button", className: "main", onclick: begin });
  const text = el("textarea", { id: "message", placeholder: t("chat.say"), "aria-label": t("chat.message") });
  const say = el("button", { className: "main" }, t("chat.send")), stop = el("button", { type: "button", hidden: true, onclick: () => conversation.stop() }, t("stop"));
  const buttons = [
    [t("chat.again"), () => { inputs.seed.value = Number(inputs.seed.value) + 1; conversation.again(); }],
    [t("chat.edit"), () => { text.value = conversation.takeBack() || text.value; text.focus(); }],
    [t("chat.new"), () => { conversation.clear(); text.focus(); }],
  ].map(([label, onclick]) => el("button", { type: "button", hidden: true, onclick }, label));
  const form = el("form", { className: "composer", onsubmit: submit }, text, el("div", { className: "row" }, say, stop, buttons, el("a", { className: "button leads", href: "#release" }, t("nav.release"))));
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return; // an input method's Enter ends its word
    event.preventDefault();
    form.requestSubmit();
  });
  place.append(el("div", { className: "chat" }, el("h1", {}, t("nav.chat")), drawer, el("div", { className: "talk" }, error, status, box, form)));

  let used = "", began = 0, loading = null, conversation = null, waits = false;
  for (const file of kept.adapters?.length ? kept.adapters : [""]) addAdapter(file);
  const files = run ? await which.show(run.folder) : [kept.adapters?.[0] || kept.model];
  const has = (job) => files.find((file) => job.words.includes(file) || job.words.some((word) => word.endsWith(`=${file}`)));
  const served = (await list()).find((job) => has(job) && !(run?.modified > job.began)); // opened after the run had written
  if (served && run) which.choose(has(served));
  if (served) enter(served.id); else propose();
  signal.addEventListener("abort", () => conversation?.stop(t("chat.left")));
  addEventListener("pagehide", () => conversation && refresh(), { signal });
  if (matchMedia("(pointer: fine)").matches) text.focus();
  repeat(signal, 3, list);

  function addAdapter(value) {
    const n = adapters.childElementCount + 1;
    const { box, input } = pathField(`adapter-${n}`, n > 1 ? t("chat.adapter n", n) : t("chat.adapter"), { value, endings: [".safetensors", ".pth"], help: n > 1 ? "" : t("chat.adapter.help") });
    adapters.append(box);
    return input;
  }

  function chosen() {
    return [...adapters.querySelectorAll("input")].map((input) => input.value.trim()).filter(Boolean);
  }

  // Is called after each change of a field: the proposal names what is chosen, and the sampling is kept.
  function update() {
    const { value } = model.input, trained = chosen().map(short).join(" + ");
    proposal.textContent = trained ? t("chat.propose", trained, short(value)) : t("chat.propose base", short(value));
    proposal.hidden = !value.trim();
    remember("sampling", Object.fromEntries(Object.entries(inputs).filter(([name, input]) => input.value !== String(usual[name])).map(([name, input]) => [name, input.value])));
  }

  // What stands in place of a conversation while no model is open.
  function propose() {
    conversation?.stop(t("chat.left"));
    conversation = null;
    used = "";
    loading?.abort();
    update();
    for (const one of [box, scales]) one.replaceChildren();
    status.replaceChildren(el("p", { className: "note" }, t(!model.input.value ? "chat.begin without" : chosen().length ? "chat.begin" : "chat.begin base"), " ", model.input.value ? "" : el("a", { href: "#base" }, t("chat.to base"))), proposal);
    buttons.forEach((button) => { button.hidden = true; });
  }

  // Lists the models that are open, each with its memory, until someone closes them.
  async function list() {
    const jobs = (await get("/api/jobs").catch(() => [])).filter((job) => job.own && job.words[0] === "serve" && job.state === "running");
    const open = jobs.map((job) => job.id).join();
    if (opened.dataset.open === open) return jobs;
    opened.dataset.open = open;
    opened.replaceChildren(...jobs.map((job) => el("li", {}, el("span", {}, t("chat.is open", Object.values(titles(job.words)).join(", "))),
      el("button", { type: "button", onclick: () => enter(job.id) }, t("chat.use")), el("button", { type: "button", onclick: () => close(job.id) }, t("chat.close")))));
    return jobs;
  }

  async function close(id) {
    try {
      await post(`/api/jobs/${id}/stop`);
      if (id === used) propose();
    } catch (problem) {
      tell(error, problem);
    }
  }

  async function begin() {
    const asked = { model: model.input.value.trim(), adapters: chosen(), state: state.input.value.trim(), ...flags };
    remember("chat", { ...asked, at: Date.now() / 1000 });
    tell(error, null);
    proposal.disabled = true;
    try {
      if (!asked.model) {
        drawer.open = true;
        model.input.focus();
        throw new Error(t("chat.no model"));
      }
      enter((await post("/api/chat", asked)).id);
    } catch (problem) {
      waits = false;
      tell(error, problem);
    }
    proposal.disabled = false;
  }

  function enter(id) {
    propose();
    used = id;
    status.replaceChildren(el("p", { className: "note" }, t("chat.loading")));
    const leave = (loading = new AbortController()), going = AbortSignal.any([signal, leave.signal]);
    repeat(going, 1, async () => {
      const job = await get(`/api/jobs/${id}`).catch((problem) => ({ state: "lost", problem }));
      if (job.state !== "running") {
        leave.abort();
        waits = false;
        used = "";
        status.replaceChildren();
        return showJob(status, id, signal);
      }
      const models = await get(`/api/chat/${id}/v1/models`).catch(() => null);
      if (!models || going.aborted) return;
      leave.abort();
      status.replaceChildren(...[...(job.output ?? "").matchAll(/^note: .*$/gm)].map(([line]) => el("p", { className: "note" }, line)));
      converse(job, models.data.map((one) => one.id));
    });
  }

  // Begins a conversation with the models of a server, or goes on with the one that was held before a reload.
  function converse(job, names) {
    const title = titles(job.words), before = recall("talk", {});
    began = job.began;
    scales.replaceChildren(...names.filter((name) => name.startsWith("adapter")).map((name) => scaleOf(name, title[name])));
    conversation = talk(box, `/api/chat/${job.id}/v1/chat/completions`, Object.fromEntries(names.map((name) => [name, title[name] ?? name])),
      before.began === began ? before.turns ?? [] : [], { asked, system: () => inputs.system.value.trim(), changed: refresh });
    refresh();
    if (waits) form.requestSubmit();
    waits = false;
  }

  // The fields of a request to a model besides its messages.
  function asked(model) {
    const think = inputs.think.value, scale = Number(scales.querySelector(`#scale-${model}`)?.value ?? 1);
    const numbers = Object.keys(STEPS).map((name) => [name, Number(inputs[name].value)]);
    return { ...Object.fromEntries(numbers), ...(think ? { think } : {}), ...(scale === 1 ? {} : { adapter_scale: scale }) };
  }

  function scaleOf(name, title) {
    const shown = el("output", {}, "1"), input = el("input", { id: `scale-${name}`, type: "range", min: 0, max: 2, step: 0.1, value: 1, oninput: () => { shown.value = input.value; } });
    return el("div", {}, el("label", { htmlFor: input.id }, t("chat.scale", title), " ", shown), input, helpLine(input, t("chat.scale.help")));
  }

  // Is called after each change of the conversation, which is there again after a reload; nothing is sent in the middle of an answer.
  function refresh() {
    const turns = conversation.turns();
    say.hidden = say.disabled = conversation.busy();
    stop.hidden = !say.hidden;
    buttons.forEach((button) => { button.hidden = !turns.length; });
    remember("talk", { began, turns });
  }

  function submit(event) {
    event.preventDefault();
    const said = text.value.trim();
    if (!said || say.disabled) return;
    if (conversation) {
      text.value = "";
      return conversation.say(said);
    }
    waits = true; // it is sent when the model is open
    if (!used && !proposal.disabled) begin(); // else it is being opened
  }
}

// The names of a server's models, by the words of its command -> titles, shortened names of their files.
function titles(words) {
  const given = words.map((word) => /^([\w-]+)=(.+)$/.exec(word)).filter(Boolean).map(([, name, file]) => [name, short(file)]);
  return { base: short(words[words.indexOf("--model") + 1]), ...Object.fromEntries(given) };
}
