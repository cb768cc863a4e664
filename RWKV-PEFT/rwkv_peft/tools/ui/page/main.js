// The pages by their names, which of them is open (the part of the address after #), and which steps are done.
import { basePage } from "./base.js";
import { chatPage } from "./chat.js";
import { dataPage } from "./data.js";
import { asListed, el, get, keepFor, recall, repeat, settings, settle, takeDrops, tell } from "./lib.js";
import { releasePage } from "./release.js";
import { live } from "./run.js";
import { runsPage } from "./runs.js";
import { language, LANGUAGES, speak, t } from "./texts.js";
import { trainPage } from "./train.js";

const PAGES = { base: basePage, data: dataPage, train: trainPage, chat: chatPage, release: releasePage, runs: runsPage };
const main = document.getElementById("main"), nav = document.querySelector("nav");
let leaving = new AbortController();
let about = null;

async function open(event) {
  leaving.abort();
  const { signal } = (leaving = new AbortController());
  const [asked, ...rest] = decoded(location.hash.slice(1)).split(":"), name = asked in PAGES ? asked : "base";
  for (const link of nav.children) link.ariaCurrent = link.hash === `#${name}` ? "page" : null;
  document.title = `${t(`nav.${name}`)}: rwkv-peft`;
  const place = el("div");
  main.replaceChildren(place);
  try {
    about ??= await get("/api/about");
    document.getElementById("root").textContent = about.root;
    keepFor(about.root);
    if (!recall("train", null)) await takeOver();
    repeat(signal, 5, tick);
    await PAGES[name](place, about, signal, rest.join(":"));
  } catch (error) {
    tell(place, error);
  }
  const heading = place.querySelector("h1");
  if (!event || !heading || main.contains(document.activeElement)) return;
  heading.tabIndex = -1; // what had the focus is gone, or is the link that led here
  heading.focus({ preventScroll: true });
}

// A browser in which nothing is chosen yet begins with what the newest run used.
async function takeOver() {
  const newest = (await get("/api/runs").catch(() => [])).find((run) => run.flags.load_model);
  if (!newest) return; // the next page looks again
  const known = new Set(about.form.flatMap(({ fields }) => fields.map(({ flag }) => flag)));
  const used = Object.entries(newest.flags).filter(([flag]) => known.has(flag) && !["proj_dir", "resume"].includes(flag));
  settle(Object.fromEntries(used.map(([flag, value]) => [flag, value === true ? "on" : Array.isArray(value) ? value.map(asListed).join(" ") : String(value)])));
}

// Marks the steps that are done.
async function tick() {
  const runs = await get("/api/runs").catch(() => []), { load_model, data_file } = settings();
  const wrote = (ending) => runs.some((run) => !live(run) && run.files.some((file) => ending.test(file)));
  const done = { base: load_model, data: data_file, train: wrote(/\.(safetensors|pth)$/), chat: recall("talk", null), release: wrote(/^merged.*\.(pth|gguf|st)$/) };
  for (const link of nav.children) {
    const step = link.hash.slice(1);
    link.replaceChildren(t(`nav.${step}`), done[step] ? el("span", { className: "tick", role: "img", ariaLabel: t("nav.done") }, "✓") : "");
  }
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // somebody typed a % into the address
  }
}

document.documentElement.lang = language;
nav.ariaLabel = t("nav.label");
nav.append(...Object.keys(PAGES).map((name) => el("a", { href: `#${name}` }, t(`nav.${name}`))));
document.querySelector("header").append(el("select", { id: "language", ariaLabel: t("language"), onchange: ({ target }) => speak(target.value) },
  Object.entries(LANGUAGES).map(([value, name]) => el("option", { value, selected: value === language, lang: value }, name))));
const skip = document.querySelector(".skip");
skip.textContent = t("to the content");
skip.addEventListener("click", (event) => {
  event.preventDefault(); // its address would open another page
  main.focus();
});
takeDrops(main);
addEventListener("hashchange", open);
open();
