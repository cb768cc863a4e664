// A command that the page started: what it does, what it printed, and how it ended.
import { el, get, post, repeat, tell, words } from "./lib.js";
import { t } from "./texts.js";

const KILLED = 137;
const STOPPED = [130, 143]; // exit codes of a command that Ctrl-C or SIGTERM ended in order
const failed = (job) => job.state === "lost" || (job.state === "ended" && job.code !== 0 && !STOPPED.includes(job.code));

export function badge(job) {
  const ended = failed(job) ? "failed" : job.code === 0 ? "done" : "stopped", state = job.state === "ended" ? ended : job.state;
  return el("span", { className: `state ${["running", "failed"].includes(state) ? state : ""}` }, t(`state.${state}`));
}

// Shows a command in `place` until it has ended. done() is called if it ended well. run: the command is a run's, which is
// shown, stopped and resumed as such, so that only its notes, its mistake and, folded, its words and output are added.
// bar: it prints how far it is, as "12 %  …", which is shown as a bar. open: its words and output are what is asked for.
// otherwise() is called if it ended in another way.
export function showJob(place, id, signal, { run = false, bar = false, open = false, done = () => {}, otherwise = () => {} } = {}) {
  const line = el("pre"), output = el("pre", { tabIndex: 0, "aria-label": t("job.output") });
  const printed = el("details", { open }, el("summary", {}, t("job.both")), line, output);
  const state = el("div"), share = el("progress", { max: 100, value: 0, "aria-label": t("job.share") }), far = el("p", {}, "");
  const notes = el("div"), wrong = el("div"), buttons = el("div", { className: "row" });
  place.append(el("div", { className: "job" }, ...(run ? [] : [state, ...(bar ? [share, far] : [])]), notes, wrong, run ? "" : buttons, printed));
  const leave = new AbortController();
  let next = 0, stopping = false;
  const stop = ({ target }) => {
    target.disabled = stopping = true;
    post(`/api/jobs/${id}/stop`).catch((problem) => tell(wrong, problem));
  };
  repeat(AbortSignal.any([signal, leave.signal]), 1, async () => {
    let job;
    try {
      job = await get(`/api/jobs/${id}`, { begin: next });
    } catch (problem) {
      tell(wrong, problem);
      leave.abort();
      return;
    }
    next = job.next ?? next;
    const low = output.scrollHeight - output.scrollTop - output.clientHeight < 30;
    output.append(job.output ?? "");
    if (low) output.scrollTop = output.scrollHeight;
    line.textContent = words(job.words);
    state.replaceChildren(badge(job));
    const [, percent, rest] = [...output.textContent.matchAll(/^ *(\d+) % +(.*)$/gm)].at(-1) ?? ["", 0, ""];
    share.value = percent;
    far.textContent = rest;
    buttons.replaceChildren(job.state === "running" ? el("button", { type: "button", disabled: stopping, onclick: stop }, t("stop")) : "");
    if (job.state === "running") return;
    leave.abort();
    if (job.code === 0) done();
    else otherwise();
    notes.replaceChildren(...[...output.textContent.matchAll(/^note: .*$/gm)].map(([note]) => el("p", { className: "note" }, note)));
    if (failed(job)) tell(wrong, job.state === "lost" ? t("job.lost") : lastWords(output.textContent, job.code));
  });
}

function lastWords(text, code) {
  const at = text.lastIndexOf("error: ");
  if (code === KILLED) return t("job.killed");
  return at >= 0 ? text.slice(at).trim() : t("job.failed", code);
}
