// The pages by their names, and which of them is open: the part of the address after #.
import { el, get, takeDrops, tell } from "./lib.js";
import { dataPage } from "./data.js";
import { trainPage } from "./train.js";
import { runsPage } from "./runs.js";
import { chatPage } from "./chat.js";
import { releasePage } from "./release.js";
import { language, LANGUAGES, speak, t } from "./texts.js";

const PAGES = { data: dataPage, train: trainPage, runs: runsPage, chat: chatPage, release: releasePage };
const main = document.getElementById("main");
let leaving = new AbortController();
let about = null;

async function open(event) {
  leaving.abort();
  leaving = new AbortController();
  const [name, ...rest] = decoded(location.hash.slice(1)).split(":");
  const page = PAGES[name] ?? dataPage;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${page === dataPage ? "data" : name}`) {
      link.setAttribute("aria-current", "page");
      document.title = `${link.textContent}: rwkv-peft`;
    } else link.removeAttribute("aria-current");
  }
  const place = el("div");
  main.replaceChildren(place);
  try {
    about ??= await get("/api/about");
    document.getElementById("root").textContent = about.root;
    await page(place, about, leaving.signal, rest.join(":"));
  } catch (error) {
    tell(place, error);
  }
  const heading = place.querySelector("h1");
  if (!event || !heading || main.contains(document.activeElement)) return;
  heading.tabIndex = -1; // what had the focus is gone, or is the link that led here
  heading.focus({ preventScroll: true });
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // somebody typed a % into the address
  }
}

document.documentElement.lang = language;
document.querySelector("nav").ariaLabel = t("nav.label");
document.querySelector("nav").append(...Object.keys(PAGES).map((name) => el("a", { href: `#${name}` }, t(`nav.${name}`))));
document.getElementById("language").replaceWith(el("select", { id: "language", "aria-label": t("language"), onchange: ({ target }) => speak(target.value) },
  Object.entries(LANGUAGES).map(([value, name]) => el("option", { value, selected: value === language, lang: value }, name))));
document.querySelector(".skip").textContent = t("to the content");
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // its address would open another page
  main.focus();
});
takeDrops(main);
addEventListener("hashchange", open);
open();
