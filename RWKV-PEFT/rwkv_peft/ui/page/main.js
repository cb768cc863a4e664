// The pages by their names, and which of them is open: the part of the address after #.
import { el, get, tell } from "./lib.js";
import { dataPage } from "./data.js";
import { trainPage } from "./train.js";
import { runsPage } from "./runs.js";
import { chatPage } from "./chat.js";
import { releasePage } from "./release.js";

const PAGES = { data: dataPage, train: trainPage, runs: runsPage, chat: chatPage, release: releasePage };
const main = document.getElementById("main");
let leaving = new AbortController();
let about = null;

async function open() {
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
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // somebody typed a % into the address
  }
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // its address would open another page
  main.focus();
});
for (const name of ["dragover", "drop"]) addEventListener(name, (event) => {
  if (event.dataTransfer.types.includes("Files")) event.preventDefault(); // a browser would open the file in place of the page
});
addEventListener("hashchange", open);
open();
