// The strip of figures, and what is well or not with the pool.

import { byId, h, keyed, s, setClass, setText } from "./dom.js";
import { age, count, plural, seconds, share } from "./format.js";

const LATENCIES = [["queue", "in queue"], ["first_token", "first token"], ["per_token", "each token"], ["total", "whole request"]];
const SILENT_S = 5;
const FULL = 0.95;
const parts = {};

function figure(name, title, curve) {
  const value = h("p", { class: "value" });
  const line = curve ? s("svg", { viewBox: "0 0 150 26", preserveAspectRatio: "none", role: "img", "aria-label": curve }) : null;
  const path = s("path", { class: "curve" });
  const area = s("path", { class: "under" });
  line?.append(area, path);
  const below = h("p", { class: "below" });
  parts[name] = { value, below, path, area };
  return h("div", { class: "figure" }, h("h2", { text: title }), value, below, line);
}

export function build() {
  const rows = LATENCIES.map(([name, title]) => {
    const cells = [0, 1, 2].map(() => h("td", { class: "n", text: "–" }));
    parts[name] = { cells };
    return h("tr", {}, h("th", { scope: "row", text: title }), ...cells);
  });
  const heads = ["p50", "p90", "p99"].map((text) => h("th", { class: "n", scope: "col", text }));
  const corner = (parts.finished = h("th", { scope: "col", text: "latency" }));
  byId("figures").append(
    figure("waiting", "Waiting", "Waiting requests, last 5 minutes"),
    figure("running", "Slots taken", "Slots taken, last 5 minutes"),
    figure("tokens", "Tokens per second", "Tokens per second, last 5 minutes"),
    figure("acceptance", "Acceptance", "Accepted share of drafted tokens, last 5 minutes"),
    h("div", { class: "figure table" }, h("table", { "aria-label": "Latency of requests that finished in the last 5 minutes" },
      h("thead", {}, h("tr", {}, corner, ...heads)), h("tbody", {}, ...rows))),
  );
}

function draw(name, values, most) {
  const top = most ?? Math.max(1, ...values.filter((value) => value !== null));
  const x = (i) => ((150 * i) / (values.length - 1)).toFixed(1);
  const y = (value) => (25 - (24 * value) / top).toFixed(1);
  let line = "";
  let under = "";
  let from = null;
  values.forEach((value, i) => {
    if (value === null) return;
    const starts = i === 0 || values[i - 1] === null;
    if (starts) from = i;
    line += `${starts ? "M" : "L"}${x(i)} ${y(value)}`;
    under += starts ? `M${x(i)} 26L${x(i)} ${y(value)}` : `L${x(i)} ${y(value)}`;
    if (i === values.length - 1 || values[i + 1] === null) {
      if (from === i) line += "h0.8";
      under += `L${x(i)} 26Z`;
    }
  });
  parts[name].path.setAttribute("d", line);
  parts[name].area.setAttribute("d", under);
}

function put(name, value, small = "") {
  setText(parts[name].value, value);
  setText(parts[name].below, small);
}

// The last buckets in one number: one alone would jump.
function recently(values) {
  const some = values.slice(-5).filter((value) => value !== null);
  return some.length ? some.reduce((sum, value) => sum + value, 0) / some.length : undefined;
}

export function update(picture) {
  const pool = picture.pools[0];
  const { figures, workers } = picture;
  const slots = workers.reduce((sum, worker) => sum + worker.slots.length, 0);
  const used = workers.reduce((sum, worker) => sum + worker.kv_used_tokens, 0);
  const capacity = workers.reduce((sum, worker) => sum + worker.kv_capacity_tokens, 0);
  put("waiting", count(pool.waiting), `${seconds(pool.backlog_s)} of service`);
  put("running", `${count(pool.running)} / ${count(slots)}`, capacity ? `KV cache ${share(used / capacity)}` : "");
  const rate = recently(figures.tokens_per_s);
  put("tokens", rate === undefined ? "–" : count(rate), `highest ${count(Math.max(0, ...figures.tokens_per_s))} in 5 min`);
  const accepted = recently(figures.acceptance);
  put("acceptance", accepted === undefined ? "–" : share(accepted), "of drafted tokens");
  draw("waiting", figures.waiting);
  draw("running", figures.running, Math.max(slots, 1));
  draw("tokens", figures.tokens_per_s);
  draw("acceptance", figures.acceptance, 1);
  for (const [name] of LATENCIES) {
    figures.latency_s[name].forEach((value, i) => setText(parts[name].cells[i], seconds(value)));
  }
  setText(parts.finished, `latency of ${count(figures.finished)}`);
}

function checks(picture, now_s) {
  const pool = picture.pools[0];
  const { workers, figures } = picture;
  const found = [];
  const add = (key, state, text) => found.push({ key, state, text });
  add("leader", pool.leader ? "good" : "bad", pool.leader ? `Scheduler ${pool.leader} leads, epoch ${pool.epoch}, commit ${count(pool.commit_seq)}` : "No scheduler leads the pool");
  if (!workers.length) add("workers", "bad", "No worker is in session");
  else add("workers", "good", `${plural(workers.length, "worker")} in session`);
  for (const worker of workers) {
    const silent_s = now_s - worker.last_seen_s;
    const name = worker.worker_id;
    if (silent_s > SILENT_S) add(`silent ${name}`, "bad", `Worker ${name} was last heard ${age(worker.last_seen_s, now_s)} ago`);
    if (worker.draining) add(`drains ${name}`, "hold", `Worker ${name} is draining: it gets no new requests`);
    if (worker.kv_capacity_tokens && worker.kv_used_tokens > FULL * worker.kv_capacity_tokens) {
      add(`full ${name}`, "hold", `Worker ${name}: KV cache ${share(worker.kv_used_tokens / worker.kv_capacity_tokens)} full`);
    }
  }
  const failed = figures.finish_reasons.error ?? 0;
  const late = figures.finish_reasons.deadline ?? 0;
  if (failed) add("failed", "bad", `${plural(failed, "request")} of the last ${count(figures.finished)} failed`);
  if (late) add("late", "hold", `${plural(late, "request")} of the last ${count(figures.finished)} missed the deadline`);
  if (!failed && !late) add("failed", "good", `No failures among the last ${count(figures.finished)} finished`);
  return found;
}

const WORDS = { good: "well", hold: "attention", bad: "problem" };

export function updateHealth(picture, now_s) {
  keyed(byId("health"), checks(picture, now_s), (item) => item.key, () => h("li", {}, h("span", { class: "hidden" }), h("span")),
    (node, item) => {
      setClass(node, item.state);
      setText(node.firstChild, `${WORDS[item.state]}: `);
      setText(node.lastChild, item.text);
    });
}
