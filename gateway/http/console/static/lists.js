// Slots by worker, and the requests that finished last.

import { byId, h, keyed, setClass, setText } from "./dom.js";
import { acceptance, age, count, ms, perStep, plural, seconds, share, state, tokens } from "./format.js";

const SLOT = [["slot", "n"], ["request", ""], ["tokens", "n"], ["", "less"], ["accept.", "n"], ["per step", "n less"], ["needs", "n"], ["since", "n"]];
const DONE = [["request", ""], ["end", ""], ["tokens", "n"], ["accept.", "n less"], ["first", "n less"], ["whole", "n"], ["ago", "n"]];

const heads = (columns) =>
  h("thead", {}, h("tr", {}, ...columns.map(([text, kind]) => (text ? h("th", { scope: "col", class: kind, text }) : h("td", { class: kind })))));
const idCell = (open) => h("td", { class: "id" }, h("button", { type: "button", class: "plain", on: { click: (event) => open(event.target.textContent) } }));

function setId(cell, id) {
  setText(cell.firstChild, id);
  cell.firstChild.title = id;
  cell.firstChild.hidden = !id;
}

export function updateSlots(picture, now_s, open) {
  const running = new Map(picture.running.map((row) => [row.request_id, row]));
  const holder = byId("slots");
  setText(byId("slots-note"), picture.workers.length ? plural(picture.workers.length, "worker") : "no worker is in session");
  keyed(holder, picture.workers, (worker) => worker.worker_id,
    () => h("div", { class: "wrap" }, h("table", {}, h("caption", {}, h("span", { class: "id" }), " ", h("span", { class: "quiet" })), heads(SLOT), h("tbody"))),
    (node, worker) => updateWorker(node.firstChild, worker, running, now_s, open));
}

function updateWorker(table, worker, running, now_s, open) {
  setText(table.caption.firstChild, worker.worker_id);
  const kv = worker.kv_capacity_tokens ? `, KV ${share(worker.kv_used_tokens / worker.kv_capacity_tokens)}` : "";
  const speed = `draft ${ms(worker.draft_ms)}, verify ${ms(worker.verify_ms)}, switch ${ms(worker.switch_ms)}`;
  setText(table.caption.lastChild, `${worker.draining ? "draining, " : ""}${worker.device}${kv}, ${speed}, ${count(worker.num_steps)} steps`);
  keyed(table.tBodies[0], worker.slots, (slot) => slot.slot, (slot) =>
    h("tr", {}, h("td", { class: "n", text: `${slot.slot}` }), idCell(open), h("td", { class: "n" }),
      h("td", { class: "less" }, h("span", { class: "meter run" }, h("i"))), ...SLOT.slice(4).map(([, kind]) => h("td", { class: kind }))),
  (node, slot) => {
    const row = running.get(slot.request_id);
    const cells = node.cells;
    setId(cells[1], slot.request_id);
    if (!slot.request_id && !cells[1].free) cells[1].append((cells[1].free = h("span", { class: "quiet", text: "free" })));
    if (cells[1].free) cells[1].free.hidden = Boolean(slot.request_id);
    cells[3].firstChild.hidden = !row;
    cells[3].firstChild.firstChild.style.width = row ? `${Math.min(100, (100 * row.output_tokens) / Math.max(1, row.max_tokens))}%` : "0";
    const texts = row ? [tokens(row), acceptance(row), perStep(row), seconds(row.perceived_service_s), age(row.leased_s, now_s)] : ["", "", "", "", ""];
    [2, 4, 5, 6, 7].forEach((place, i) => setText(cells[place], texts[i]));
  });
}

export function updateFinished(picture, now_s, open) {
  const holder = byId("finished");
  setText(byId("finished-note"), picture.finished.length ? `the newest of ${count(picture.figures.finished)} in 5 min` : "nothing in the last 5 min");
  if (!holder.firstChild) holder.append(h("table", { "aria-labelledby": "finished-title" }, heads(DONE), h("tbody")));
  keyed(holder.firstChild.tBodies[0], picture.finished.slice(0, 30), (row) => row.request_id,
    () => h("tr", {}, idCell(open), h("td"), ...DONE.slice(2).map(([, kind]) => h("td", { class: kind }))),
    (node, row) => {
      const [sign, word, kind] = state(row);
      setId(node.cells[0], row.request_id);
      setText(node.cells[1], `${sign} ${word}`);
      setClass(node.cells[1], kind);
      const first = row.first_token_s ? seconds(row.first_token_s - row.arrival_s) : "–";
      const texts = [count(row.output_tokens), row.num_steps ? acceptance(row) : "–", first, seconds(row.finished_s - row.arrival_s), age(row.finished_s, now_s)];
      texts.forEach((text, i) => setText(node.cells[i + 2], text));
    });
}
