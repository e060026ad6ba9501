// One request: why it stands where it stands, its life, its output over the steps.

import * as api from "./api.js";
import { byId, h, setClass, setText } from "./dom.js";
import { acceptance, clock, count, perStep, rank, seconds, share, state } from "./format.js";
import { histogram, life, steps } from "./timeline.js";
import { why } from "./why.js";

const EACH_MS = 1000;
const panel = byId("request");
let id = "";
let answer = null;
let picture = null;
let session = {};
let parts = null;
let readAt_ms = 0;
let readSeq = -1;
let reading = false;
let onClosed = () => {};

export function build(options) {
  onClosed = options.onClosed;
}

export const isOpen = () => id !== "";
export const current = () => id;

export function open(requestId, permissions) {
  session = permissions;
  if (requestId === id) return;
  id = requestId;
  answer = null;
  panel.hidden = false;
  parts = {
    title: h("h2", { tabindex: -1, class: "id", text: id }),
    badge: h("p"),
    note: h("p", { role: "status" }),
    cancel: h("button", { type: "button", class: "danger", hidden: true, text: "Cancel request", on: { click: askCancel } }),
    content: h("div"),
    text: h("div"),
  };
  panel.replaceChildren(
    h("div", { class: "title" }, parts.title, h("div", { class: "buttons" }, parts.cancel, h("button", { type: "button", text: "Close", on: { click: close } }))),
    parts.badge, parts.note, parts.content, parts.text,
  );
  parts.title.focus();
  read();
}

export function close() {
  if (!id) return;
  id = "";
  panel.hidden = true;
  panel.replaceChildren();
  onClosed();
}

export function update(newest) {
  picture = newest;
  if (!id || (answer && answer.request.state === "finished") || newest.pools[0].commit_seq === readSeq) return;
  if (performance.now() - readAt_ms >= EACH_MS) read();
}

async function read() {
  if (reading) return;
  reading = true;
  readAt_ms = performance.now();
  readSeq = picture?.pools[0].commit_seq ?? -1;
  const asked = id;
  try {
    const found = await api.timeline(asked);
    if (asked !== id) return;
    answer = found;
    setText(parts.note, "");
    draw();
    if (session.shows_text && found.request.state === "finished" && !parts.text.firstChild) await readText(asked);
  } catch (error) {
    if (asked === id) setText(parts.note, error.message);
    if (!(error instanceof api.Refused)) console.error(error);
  } finally {
    reading = false;
    if (id && asked !== id) read();
  }
}

async function readText(asked) {
  const found = await api.text(asked);
  if (asked !== id) return;
  parts.text.replaceChildren(h("h3", { text: "Prompt" }), h("pre", { tabindex: 0, text: found.prompt }), h("h3", { text: "Output" }), h("pre", { tabindex: 0, text: found.output }));
}

function facts(row) {
  const since = (instant_s) => (instant_s ? seconds(instant_s - row.arrival_s) : "–");
  const pairs = [
    ["accepted at", clock(row.arrival_s)],
    ["class", row.request_class || "–"],
    ["priority", `${row.priority}`],
    ["deadline", row.deadline_s ? clock(row.deadline_s) : "none"],
    ["prompt", `${count(row.prompt_tokens)} tokens`],
    ["output", `${count(row.output_tokens)} of at most ${count(row.max_tokens)}`],
    ["predicted output", `${count(row.predicted_output_tokens)} tokens`],
    ["perceptible", row.perceptible ? "yes" : "no"],
    ["level, rank", `${row.level}, ${rank(row.rank)}`],
    ["still needs", seconds(row.perceived_service_s)],
    ["service had", seconds(row.attained_service_s)],
    ["steps", count(row.num_steps)],
    ["acceptance", row.num_draft_tokens ? `${acceptance(row)} of ${count(row.num_draft_tokens)} drafted` : acceptance(row)],
    ["acceptance estimate", share(row.acceptance_estimate)],
    ["tokens per step", perStep(row)],
    ["preemptions", count(row.preemptions)],
    ["worker, slot", row.worker_id ? `${row.worker_id}, ${row.slot}` : "–"],
    ["first slot after", since(row.first_scheduled_s)],
    ["first token after", since(row.first_token_s)],
    ["ended after", since(row.finished_s)],
  ];
  return h("dl", { class: "facts" }, ...pairs.map(([name, value]) => h("div", {}, h("dt", { text: name }), h("dd", { text: value }))));
}

function eventTable(row) {
  const lines = answer.events.map((event) => h("tr", {}, h("td", { class: "n k", text: `+${seconds(Math.max(event.time_s - row.arrival_s, 0))}` }),
    h("td", { class: "k", text: event.kind }), h("td", { text: event.worker_id }), h("td", { text: event.detail })));
  const head = ["after", "what", "worker", "detail"].map((text, i) => h("th", { scope: "col", class: i ? null : "n", text }));
  return h("table", { "aria-label": "Events" }, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...lines));
}

function draw() {
  const row = answer.request;
  const [sign, word, kind] = state(row);
  setText(parts.badge, `${sign} ${row.state === "finished" ? `finished: ${word}` : word}`);
  setClass(parts.badge, kind);
  parts.cancel.hidden = !session.may_cancel || row.state === "finished";
  const pool = picture?.pools[0] ?? { levels: [], leader: "?", policy: "", running: 0 };
  const reasons = why(row, pool, picture?.workers ?? [], answer.position);
  const keep = panel.scrollTop;
  const width = Math.max(parts.content.clientWidth, 240);
  parts.content.replaceChildren(
    h("h3", { text: row.state === "finished" ? "How it ended" : "Why it stands where it stands" }),
    h("ul", { class: "why" }, ...reasons.map((text) => h("li", { text }))),
    h("h3", { text: "Life" }), life(answer, width),
    h("p", { class: "legend" }, h("span", { text: "waits for its first slot" }), h("span", { class: "r", text: "in a slot" }), h("span", { class: "h", text: "preempted, waits again" }), row.first_token_s ? h("span", { class: "t", text: "first token" }) : null),
    h("h3", { text: "Tokens over steps" }), steps(answer, width),
    ...(histogram(row.acceptance_histogram) ? [h("h3", { text: "Drafted tokens accepted in a step" }), histogram(row.acceptance_histogram)] : []),
    h("h3", { text: "Beliefs and counts" }), facts(row),
    h("h3", { text: "Events" }), answer.events_lost ? h("p", { class: "hold", text: "▲ Its first events are no longer kept." }) : null, eventTable(row),
  );
  panel.scrollTop = keep;
}

export async function askCancel() {
  if (!id || !session.may_cancel || !answer || answer.request.state === "finished") return;
  if (!window.confirm(`Cancel request ${id}? Its client gets what it has so far.`)) return;
  try {
    await api.cancel(id);
    await read();
  } catch (error) {
    setText(parts.note, error.message);
  }
}
