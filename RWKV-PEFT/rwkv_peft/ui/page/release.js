// Release: merge a run's adapter into its base, check the result, convert it for a runtime.
import { el, get, pathField, post, tell } from "./lib.js";
import { showJob } from "./runs.js";

const FORMATS = { gguf: "GGUF, for llama.cpp", st: "safetensors, for web-rwkv and Ai00" };

export async function releasePage(place, about, signal, folder) {
  const runs = await get("/api/runs");
  const run = pathField("run", "Run, or adapter", { value: folder || runs[0]?.folder || "", folders: true, help: "a run's folder, or its adapter.safetensors" });
  const base = pathField("base", "Base model", { endings: [".pth"] });
  const output = pathField("output", "Merged model", { help: "is written by Merge" });
  const format = el("select", { id: "format" }, Object.entries(FORMATS).map(([value, text]) => el("option", { value }, text)));
  const error = el("div"), result = el("div");
  const buttons = {
    merge: () => ["merge", "--base_model", base.input.value, "--bone_checkpoint", adapter(), "--output", output.input.value],
    check: () => ["check", "--base_model", base.input.value, "--bone_checkpoint", adapter(), "--merged", output.input.value],
    convert: () => ["convert", output.input.value, output.input.value.replace(/\.pth$/, "") + `.${format.value}`],
    inspect: () => ["inspect", output.input.value],
  };
  place.append(el("h1", {}, "Release"), el("p", { className: "lead" },
    "Merging folds what was trained into the base: one .pth that every RWKV runtime loads. Checking recomputes each tensor and runs the file."),
  el("div", { className: "fields" }, run.box, base.box, output.box,
    el("div", {}, el("label", { htmlFor: "format" }, "Convert to"), format)),
  el("div", { className: "row" }, ...Object.keys(buttons).map((name) =>
    el("button", { type: "button", className: name === "merge" ? "main" : "", onclick: () => begin(name) }, name[0].toUpperCase() + name.slice(1)))),
  error, result);
  run.input.addEventListener("input", fill);
  fill();

  function fill() {
    const found = runs.find((one) => one.folder === run.input.value);
    if (!found) return;
    base.input.value = found.flags.load_model ?? base.input.value;
    output.input.value = `${found.folder}/merged.pth`;
  }

  function adapter() {
    const found = runs.find((one) => one.folder === run.input.value);
    return found ? `${found.folder}/adapter.safetensors` : run.input.value;
  }

  async function begin(name) {
    tell(error, null);
    result.replaceChildren();
    try {
      const command = buttons[name]();
      if (command.includes("")) throw new Error("fill in the run, its base and the merged model's name first");
      const { id } = await post("/api/jobs", { words: command });
      showJob(result, id, signal);
    } catch (problem) {
      tell(error, problem);
    }
  }
}
