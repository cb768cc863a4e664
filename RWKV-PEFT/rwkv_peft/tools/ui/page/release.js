// Release: merge a run's adapter into its base, check the result, convert it for a runtime, push it to the hub.
import { adapterChoice, download, el, get, pathField, post, tell } from "./lib.js";
import { showJob } from "./runs.js";

// the end of a converted file's name, and for whom it is
const FORMATS = { ".gguf": "GGUF, for llama.cpp", ".st": "safetensors, for web-rwkv and Ai00", "-hf": "a folder, for transformers" };

export async function releasePage(place, about, signal, folder) {
  const runs = await get("/api/runs");
  const run = pathField("run", "Run, or adapter", { value: folder || runs[0]?.folder || "", folders: true, endings: [".safetensors"], help: "a run's folder, or its adapter.safetensors" });
  const base = pathField("base", "Base model", { endings: [".pth"] });
  const output = pathField("output", "Merged model", { help: "is written by Merge" });
  const type = el("select", { "aria-label": "type of its matrices" }, about.gguf.map((one) => el("option", { selected: one === "f16" }, one)));
  const format = el("select", { "aria-label": "format", onchange: () => { type.hidden = format.value !== ".gguf"; } }, Object.entries(FORMATS).map(([value, text]) => el("option", { value }, text)));
  const repo = el("input", { placeholder: "NAME/REPOSITORY", "aria-label": "repository", spellcheck: false });
  const open = el("select", { "aria-label": "who sees it" }, el("option", { value: "--private" }, "private"), el("option", { value: "" }, "public"));
  const card = el("pre", { tabIndex: 0, "aria-label": "card" }), error = el("div"), result = el("div");
  let first = "", file = "", named = ""; // what is to be taken of the run, what is chosen, and the name for it merged
  const which = adapterChoice(take);
  const known = () => runs.find((one) => one.folder === run.input.value.trim());
  const adapter = () => (known() ? file : run.input.value.trim());
  const merged = () => output.input.value.trim(), from = () => base.input.value.trim();
  const converted = () => merged().replace(/\.pth$/, "") + format.value;
  const push = (...more) => ["push", run.input.value.trim(), repo.value.trim(), ...(open.value ? [open.value] : []), ...(known() && file !== first ? ["--files", file.split("/").at(-1)] : []), ...more];
  const steps = [
    ["Merge", "folds what was trained into the base: one .pth that every RWKV runtime loads.",
      () => ["merge", "--base_model", from(), "--bone_checkpoint", adapter(), "--output", merged()]],
    ["Check", "recomputes each tensor of the merged model, and runs it.",
      () => ["check", "--base_model", from(), "--bone_checkpoint", adapter(), "--merged", merged()]],
    ["Inspect", "shows what is in the merged model.", () => ["inspect", merged()]],
    ["Convert", "writes the merged model for a runtime that does not load .pth:", () => ["convert", merged(), converted(), ...(type.hidden ? [] : ["--gguf_type", type.value])], format, type],
    ["Preview", "says which files Push would send, with the card below:", () => push("--dry_run"), repo, open],
    ["Push", "sends them to the Hugging Face hub. Log in once with hf auth login in a terminal.", () => push()],
  ];
  const buttons = new Map(steps.map(([name, , command], n) => [name,
    el("button", { type: "button", className: n ? "" : "main", onclick: () => begin(command) }, name)]));
  const whole = el("p", { className: "note", hidden: true }, "This run trained the model itself: its file is what runtimes load, and there is nothing to merge.");
  place.append(el("h1", {}, "Release"), el("p", { className: "lead" }, "From a run to a file that others can use."),
    el("div", { className: "fields" }, run.box, which.box, base.box, output.box), whole,
    ...steps.map(([name, text, , ...inputs]) => el("div", { className: "row step" }, buttons.get(name), el("span", {}, text), ...inputs)),
    error, result, el("details", {}, el("summary", {}, "The card of the run"), card));
  let filled = fill();
  run.input.addEventListener("input", () => { filled = fill(); });

  async function fill() {
    const found = known();
    take("");
    if (!found) return which.show("");
    base.input.value = found.flags.load_model ?? base.input.value;
    await which.show(found.folder);
    first = file;
    const { text } = await get("/api/runs/card", { folder: found.folder }).catch(() => ({ text: "" }));
    card.textContent = text || "none yet: it is written when the run ends";
  }

  function take(chosen) {
    file = chosen;
    whole.hidden = !file.endsWith(".pth");
    for (const name of ["Merge", "Check"]) buttons.get(name).disabled = !whole.hidden;
    if (!file || output.input.value !== named) return; // somebody has named it
    output.input.value = named = whole.hidden ? file.replace(/adapter(-best)?\.safetensors$/, "merged$1.pth") : file;
  }

  async function begin(words) {
    tell(error, null);
    result.replaceChildren();
    try {
      await filled;
      const command = words();
      if (command.includes("")) throw new Error(command[0] === "push" ? "fill in the run and the repository first" : "fill in the run, its base and the merged model's name first");
      const { id } = await post("/api/jobs", { words: command });
      const made = { merge: command.at(-1), convert: command[2] }[command[0]];
      showJob(result, id, signal, undefined, () => {
        if (/\.\w+$/.test(made ?? "")) result.append(el("p", {}, "Download ", download(made, made)));
      });
    } catch (problem) {
      tell(error, problem);
    }
  }
}
