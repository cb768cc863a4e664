// Release: merge a run's adapter into its base, check the result, convert it for a runtime, push it to the hub.
import { el, get, pathField, post, tell } from "./lib.js";
import { showJob } from "./runs.js";

// the end of a converted file's name, and for whom it is
const FORMATS = { ".gguf": "GGUF, for llama.cpp", ".st": "safetensors, for web-rwkv and Ai00", "-hf": "a folder, for transformers" };

export async function releasePage(place, about, signal, folder) {
  const runs = await get("/api/runs");
  const run = pathField("run", "Run, or adapter", { value: folder || runs[0]?.folder || "", folders: true, help: "a run's folder, or its adapter.safetensors" });
  const base = pathField("base", "Base model", { endings: [".pth"] });
  const output = pathField("output", "Merged model", { help: "is written by Merge" });
  const format = el("select", { "aria-label": "format" }, Object.entries(FORMATS).map(([value, text]) => el("option", { value }, text)));
  const repo = el("input", { placeholder: "NAME/REPOSITORY", "aria-label": "repository", spellcheck: false });
  const open = el("select", { "aria-label": "who sees it" }, el("option", { value: "--private" }, "private"), el("option", { value: "" }, "public"));
  const card = el("pre", { tabIndex: 0, "aria-label": "card" }), error = el("div"), result = el("div");
  const known = () => runs.find((one) => one.folder === run.input.value.trim());
  const adapter = () => (known() ? `${known().folder}/adapter.safetensors` : run.input.value.trim());
  const merged = () => output.input.value.trim(), from = () => base.input.value.trim();
  const push = (...more) => ["push", run.input.value.trim(), repo.value.trim(), ...(open.value ? [open.value] : []), ...more];
  const steps = [
    ["Merge", "folds what was trained into the base: one .pth that every RWKV runtime loads.",
      () => ["merge", "--base_model", from(), "--bone_checkpoint", adapter(), "--output", merged()]],
    ["Check", "recomputes each tensor of the merged model, and runs it.",
      () => ["check", "--base_model", from(), "--bone_checkpoint", adapter(), "--merged", merged()]],
    ["Inspect", "shows what is in the merged model.", () => ["inspect", merged()]],
    ["Convert", "writes the merged model for a runtime that does not load .pth:", () => ["convert", merged(), merged().replace(/\.pth$/, "") + format.value], format],
    ["Preview", "says which files Push would send, with the card below:", () => push("--dry_run"), repo, open],
    ["Push", "sends them to the Hugging Face hub. Log in once with hf auth login in a terminal.", () => push()],
  ];
  const buttons = new Map(steps.map(([name, , command], n) => [name,
    el("button", { type: "button", className: n ? "" : "main", onclick: () => begin(command()) }, name)]));
  const whole = el("p", { className: "note", hidden: true }, "This run trained the model itself: rwkv.pth is what runtimes load, and there is nothing to merge.");
  place.append(el("h1", {}, "Release"), el("p", { className: "lead" }, "From a run to a file that others can use."),
    el("div", { className: "fields" }, run.box, base.box, output.box), whole,
    ...steps.map(([name, text, , ...inputs]) => el("div", { className: "row step" }, buttons.get(name), el("span", {}, text), ...inputs)),
    error, result, el("details", {}, el("summary", {}, "The card of the run"), card));
  run.input.addEventListener("input", fill);
  fill();

  async function fill() {
    const found = known();
    const alone = found?.files.includes("rwkv.pth") && !found.files.includes("adapter.safetensors");
    whole.hidden = !alone;
    for (const name of ["Merge", "Check"]) buttons.get(name).disabled = Boolean(alone);
    if (!found) return;
    base.input.value = found.flags.load_model ?? base.input.value;
    output.input.value = `${found.folder}/${alone ? "rwkv" : "merged"}.pth`;
    const { text } = await get("/api/runs/card", { folder: found.folder }).catch(() => ({ text: "" }));
    card.textContent = text || "none yet: it is written when the run ends";
  }

  async function begin(command) {
    tell(error, null);
    result.replaceChildren();
    try {
      if (command.includes("")) throw new Error(command[0] === "push" ? "fill in the run and the repository first" : "fill in the run, its base and the merged model's name first");
      const { id } = await post("/api/jobs", { words: command });
      showJob(result, id, signal);
    } catch (problem) {
      tell(error, problem);
    }
  }
}
