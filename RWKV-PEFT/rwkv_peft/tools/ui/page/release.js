// Take home: what a run trained becomes one file with its base, in the form of the program that will load it; to the hub.
import { showJob } from "./job.js";
import { adapterChoice, cards, download, el, folded, get, pathField, post, remember, tell } from "./lib.js";
import { t } from "./texts.js";

const FORMATS = [".pth", ".gguf", ".st", "-hf"]; // the ends of the files' names

export async function releasePage(place, about, signal, folder) {
  const runs = (await get("/api/runs")).filter((run) => run.files.some((file) => /\.(safetensors|pth)$/.test(file)));
  const run = pathField("run", t("home.run"), { value: folder || runs[0]?.folder || "", folders: true, endings: [".safetensors"], help: t("home.run.help") });
  const base = pathField("base", t("home.base"), { endings: [".pth"], help: t("home.base.help") });
  const output = pathField("output", t("home.output"), { help: t("home.output.help") });
  const type = el("select", { id: "type" }, about.gguf.map((one) => el("option", { value: one, selected: one === "f16" }, t(`home.type.${one}`))));
  const typed = el("div", { hidden: true }, el("label", { htmlFor: "type" }, t("home.type")), type);
  const repo = el("input", { id: "repo", placeholder: t("home.repository.example"), spellcheck: false });
  const open = el("select", { id: "seen" }, el("option", { value: "--private" }, t("home.private")), el("option", { value: "" }, t("home.public")));
  const card = el("pre", { tabIndex: 0, "aria-label": t("home.card") }), error = el("div"), result = el("div", { "aria-live": "polite" });
  let first = "", file = "", named = "", format = FORMATS[0]; // what is to be taken of the run, what is chosen, and the name for it merged
  const which = adapterChoice(take);
  const known = () => runs.find((one) => one.folder === run.input.value.trim());
  const adapter = () => (known() ? file : run.input.value.trim());
  const merged = () => output.input.value.trim(), from = () => base.input.value.trim(), isWhole = () => adapter().endsWith(".pth");
  const push = (...more) => ["push", run.input.value.trim(), repo.value.trim(), ...(open.value ? [open.value] : []), ...(known() && file !== first ? ["--files", file.split("/").at(-1)] : []), ...more];
  const commands = {
    merge: () => ["merge", "--base_model", from(), "--bone_checkpoint", adapter(), "--output", merged()],
    convert: () => ["convert", merged(), merged().replace(/\.pth$/, "") + format, ...(format === ".gguf" ? ["--gguf_type", type.value] : [])],
    check: () => ["check", "--base_model", from(), "--bone_checkpoint", adapter(), "--merged", merged()],
    inspect: () => ["inspect", merged()], preview: () => push("--dry_run"), push: () => push(),
  };
  const button = (name, steps = [name], kind = "") => el("button", { type: "button", className: kind, onclick: () => begin(steps) }, t(`home.${name}`));
  const make = el("button", { type: "button", className: "main", onclick: () => begin([...(isWhole() ? [] : ["merge"]), ...(format === ".pth" ? [] : ["convert"])]) }, t("home.make"));
  const check = button("check"), whole = el("p", { className: "note", hidden: true }, t("home.whole"));
  const line = (name, one) => el("div", { className: "row step" }, one, el("span", {}, t(`home.${name}.text`)));
  const list = cards(t("home.runs"), runs.map((one) => ({ value: one.folder, title: one.folder, text: one.flags.load_model ?? "" })), run.input.value, (name) => {
    run.input.value = name;
    filled = fill();
  });
  place.append(el("h1", {}, t("nav.release")), el("p", { className: "lead" }, t("home.lead")),
    runs.length ? list : el("p", { className: "note" }, t("home.none"), " ", el("a", { href: "#train" }, t("train.start"))), which.box, whole,
    cards(t("home.for"), FORMATS.map((one) => {
      const disabled = one === ".gguf" && about.missing.includes("gguf");
      return { value: one, title: t(`home.${one}`), text: disabled ? t("home.needs", "gguf") : t(`home.${one}.text`), disabled };
    }), format, (one) => {
      format = one;
      typed.hidden = one !== ".gguf";
    }), typed, el("div", { className: "row" }, make), error, result,
    folded(t("more"), el("div", { className: "fields" }, run.box, base.box, output.box), line("check", check), line("inspect", button("inspect"))),
    folded(t("home.hub"), el("p", {}, t(about.missing.includes("huggingface_hub") ? "home.needs" : "home.hub.text", "huggingface_hub")), el("div", { className: "fields" }, el("div", {}, el("label", { htmlFor: "repo" }, t("home.repository")), repo),
      el("div", {}, el("label", { htmlFor: "seen" }, t("home.seen")), open)), el("div", { className: "row" }, button("preview"), button("push")), el("h2", {}, t("home.card")), card));
  let filled = fill();
  run.input.addEventListener("input", () => { filled = fill(); });

  async function fill() {
    const found = known();
    for (const radio of list.querySelectorAll("input")) radio.checked = radio.value === found?.folder;
    take("");
    if (!found) return which.show("");
    base.input.value = found.flags.load_model ?? base.input.value;
    await which.show(found.folder);
    first = file;
    const { text } = await get("/api/runs/card", { folder: found.folder }).catch(() => ({ text: "" }));
    card.textContent = text || t("home.no card");
  }

  function take(chosen) {
    file = chosen;
    whole.hidden = !isWhole();
    check.disabled = isWhole();
    if (!file || output.input.value !== named) return; // somebody has named it
    output.input.value = named = isWhole() ? file : file.replace(/adapter(-best)?\.safetensors$/, "merged$1.pth");
  }

  // Starts the commands of these steps, each after the one before; the last file can be downloaded and talked to.
  async function begin([step, ...others]) {
    tell(error, null);
    result.replaceChildren();
    try {
      await filled;
      if (!step) return offer(merged()); // the file is there
      const command = commands[step]();
      if (command.includes("")) throw new Error(t(command[0] === "push" ? "home.push first" : "home.first"));
      const { id } = await post("/api/jobs", { words: command });
      showJob(result, id, signal, { open: step !== "merge" && step !== "convert", done: () => {
        if (others.length) begin(others);
        else if (step === "merge" || step === "convert") offer(step === "merge" ? merged() : command[2]);
      } });
    } catch (problem) {
      tell(error, problem);
    }
  }

  function offer(made) {
    const talk = el("button", { type: "button", onclick: () => {
      remember("chat", { model: merged(), tokenizer: known()?.flags.tokenizer ?? "", at: Date.now() / 1000 });
      location.hash = "#chat";
    } }, t("home.talk"));
    result.prepend(el("div", { className: "row" }, /\.\w+$/.test(made) ? download(made, t("home.download", made)) : "", talk));
  }
}
