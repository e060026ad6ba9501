// A request's life drawn: where it waited and ran, and how many tokens its steps gave.

import { h, s } from "./dom.js";
import { count, plural, seconds } from "./format.js";

const MOST_BARS = 140;

// Stretches of a life from its events: {kind: "wait" | "run" | "hold", from_s, to_s, worker}.
export function stretches(answer) {
  const { request, events } = answer;
  const end_s = request.finished_s || Math.max(answer.time_s, request.arrival_s);
  const found = [];
  let kind = "wait";
  let worker = "";
  let from_s = request.arrival_s;
  const close = (to_s, next, at = "") => {
    const end = Math.min(Math.max(to_s, from_s), end_s);
    if (end > from_s || !found.length) found.push({ kind, worker, from_s, to_s: end });
    [kind, worker, from_s] = [next, at, end];
  };
  for (const event of events) {
    if (event.kind === "leased") close(event.time_s, "run", event.worker_id);
    else if ((event.kind === "preempted" || event.kind === "requeued") && kind === "run") close(event.time_s, "hold");
  }
  if (answer.events_lost && request.first_scheduled_s && found.length === 0) close(request.first_scheduled_s, "run", request.worker_id);
  close(end_s, "");
  return found.filter((part) => part.to_s > part.from_s || found.length === 1);
}

const NAMES = { wait: "waits", run: "runs", hold: "waits again" };

function ticks(span) {
  const rough = span / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const steps = rough > 10 ? [15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600] : [1, 2, 5, 10].map((factor) => factor * power);
  const step = steps.find((each) => each >= rough) ?? 86400;
  return Array.from({ length: Math.floor(span / step) + 1 }, (_, i) => i * step);
}

const tickText = (tick) => (tick === 0 ? "0" : tick >= 60 && tick % 30 === 0 ? `${tick / 60} min` : seconds(tick));

export function life(answer, width) {
  const WIDTH = width - 16;
  const { request } = answer;
  const parts = stretches(answer);
  const end_s = parts.at(-1).to_s;
  const span = Math.max(end_s - request.arrival_s, 1e-3);
  const x = (instant_s) => (Math.min(Math.max((instant_s - request.arrival_s) / span, 0), 1) * WIDTH).toFixed(1);
  const runs = parts.filter((part) => part.kind === "run");
  const told = `Life: ${seconds(span)}, ${plural(runs.length, "lease")}, of that ${seconds(runs.reduce((sum, part) => sum + part.to_s - part.from_s, 0))} in a slot`;
  const drawing = s("svg", { viewBox: `-8 0 ${WIDTH + 16} 62`, role: "img", "aria-label": told });
  for (const part of parts) {
    const wide = Math.max(1, x(part.to_s) - x(part.from_s));
    const high = part.kind === "run";
    drawing.append(s("rect", { class: `part-${part.kind}`, x: x(part.from_s), y: high ? 4 : 13, width: wide, height: high ? 24 : 6 },
      s("title", { text: `${NAMES[part.kind]}${part.worker ? ` on ${part.worker}` : ""} ${seconds(part.to_s - part.from_s)}` })));
    if (high && wide > 7 * part.worker.length + 8) drawing.append(s("text", { class: "on", x: Number(x(part.from_s)) + 5, y: 20, text: part.worker }));
  }
  if (request.first_token_s) {
    drawing.append(s("line", { class: "mark", x1: x(request.first_token_s), x2: x(request.first_token_s), y1: 0, y2: 33 },
      s("title", { text: `first token after ${seconds(request.first_token_s - request.arrival_s)}` })));
  }
  drawing.append(s("line", { class: "axis", x1: 0, x2: WIDTH, y1: 38, y2: 38 }));
  for (const tick of ticks(span)) {
    const at = x(request.arrival_s + tick);
    drawing.append(s("line", { class: "axis", x1: at, x2: at, y1: 38, y2: 42 }),
      s("text", { x: at, y: 54, "text-anchor": tick === 0 ? "start" : at > WIDTH - 24 ? "end" : "middle", text: tickText(tick) }));
  }
  return drawing;
}

// Tokens that each entry of the log brought. Long outputs are drawn as means of equal groups.
export function steps(answer, WIDTH) {
  const entries = answer.tokens_per_entry;
  if (!entries.length) return h("p", { class: "quiet", text: "No output yet." });
  const group = Math.ceil(entries.length / MOST_BARS);
  const bars = [];
  for (let i = 0; i < entries.length; i += group) {
    const some = entries.slice(i, i + group);
    bars.push(some.reduce((sum, value) => sum + value, 0) / some.length);
  }
  const top = Math.max(2, ...bars);
  const mean = entries.reduce((sum, value) => sum + value, 0) / entries.length;
  const told = `${plural(entries.length, "commit")} with output, ${mean.toFixed(2)} tokens each`;
  const left = 26;
  const wide = (WIDTH - left) / Math.max(bars.length, 24);
  const y = (value) => 70 - (64 * value) / top;
  const drawing = s("svg", { viewBox: `0 0 ${WIDTH} 88`, role: "img", "aria-label": `Tokens over steps: ${told}` });
  for (const value of new Set([0, Math.round(top / 2), Math.round(top)])) {
    drawing.append(s("line", { class: "axis", x1: left, x2: WIDTH, y1: y(value), y2: y(value) }),
      s("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end", text: `${value}` }));
  }
  bars.forEach((value, i) => drawing.append(s("rect", { class: "part-step", x: (left + i * wide).toFixed(1), y: y(value).toFixed(1),
    width: Math.max(0.8, wide - (wide > 4 ? 1 : 0)).toFixed(1), height: (70 - y(value)).toFixed(1) })));
  drawing.append(s("text", { x: left, y: 84, text: "1" }), s("text", { x: left + wide * bars.length, y: 84, "text-anchor": "end", text: bars.length > 12 ? count(entries.length) : "" }));
  return h("div", {}, drawing, h("p", { class: "quiet", text: `${told}${group > 1 ? `; each bar is the mean of ${group}` : ""}.` }));
}

// In how many steps so many drafted tokens were accepted.
export function histogram(counts) {
  const total = counts.reduce((sum, value) => sum + value, 0);
  if (!total) return null;
  const row = (value, accepted) => {
    const bar = h("i");
    bar.style.width = `${(100 * value) / Math.max(...counts)}%`;
    return h("tr", {}, h("th", { scope: "row", text: `${accepted} accepted` }), h("td", { class: "n", text: plural(value, "step") }),
      h("td", { class: "n", text: `${((100 * value) / total).toFixed(0)} %` }), h("td", {}, h("span", { class: "meter run" }, bar)));
  };
  return h("table", { "aria-label": "Steps by accepted drafted tokens" }, h("tbody", {}, ...counts.map(row)));
}
