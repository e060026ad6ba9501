// The waiting requests in running order. Only the rows in view exist; they are read in windows that the gateway
// reads once for all viewers.

import { queueWindow } from "./api.js";
import { byId, h, setClass, setText } from "./dom.js";
import { acceptance, age, bound, count, plural, rank, seconds, state } from "./format.js";
import { brief } from "./why.js";

const MARGIN_ROWS = 8;
const KEPT_WINDOWS = 40;
const EACH_MS = 700;
const COLUMNS = [
  ["position", "n", "#", "Place among all that wait"],
  ["request", "id", "request", ""],
  ["state", "", "state", ""],
  ["rank", "n", "rank", "Order inside the level, lower goes first"],
  ["needs", "n", "needs", "Perceived service: estimated seconds still needed"],
  ["had", "n", "had", "Attained service: seconds of decoding had"],
  ["tokens", "n", "tokens", "Output so far / predicted / at most"],
  ["acceptance", "n", "accept.", "Accepted share of drafted tokens; ~ is an estimate"],
  ["perceptible", "", "perc.", "Perceptible: its remaining time can be estimated"],
  ["waits", "n", "age", "Time since it was accepted"],
  ["why", "", "why", "What has decided its place last"],
];

const grid = byId("queue");
const windows = new Map(); // "level/offset" -> {rows, seq}
const wanted = new Set();
const rows = []; // reused elements
let levels = [];
let starts = [];
let total = 0;
let waiting = 0;
let seq = -1;
let size = 50;
let active = 0;
let chosen = "";
let now = () => Date.now() / 1e3;
let open = () => {};
let live = () => true;
let lastRead_ms = 0;
let timer = 0;
let frame = 0;
let view = 0; // height of what is in view
let body;

export function build(options) {
  ({ now, open, live } = options);
  const head = h("div", { class: "head", role: "rowgroup" }, h("div", { class: "row", role: "row", "aria-rowindex": 1 },
    ...COLUMNS.map(([name, kind, text, title]) =>
      h("span", { class: `${kind} c-${name}`, role: "columnheader", title: title || null, text })),
    h("span", { class: "c-short", role: "columnheader", text: "in short" })));
  body = h("div", { class: "body", role: "rowgroup" });
  grid.append(head, body);
  grid.addEventListener("scroll", draw, { passive: true });
  grid.addEventListener("keydown", onKey);
  // The row may hold another request by the time that the button is let go.
  let pressed = null;
  body.addEventListener("pointerdown", (event) => {
    const row = event.target.closest(".row");
    pressed = row && { index: row.index, id: row.request?.request_id };
  });
  body.addEventListener("click", () => {
    if (!pressed) return;
    active = pressed.index;
    if (pressed.id) open(pressed.id);
    draw();
  });
  new ResizeObserver(([entry]) => {
    view = entry.contentRect.height;
    draw();
  }).observe(grid);
}

export const setWindowRows = (value) => (size = value);
export const focus = () => grid.focus();

export function choose(id) {
  chosen = id;
  draw();
}

export function update(pool) {
  levels = pool.levels.filter((level) => level.waiting > 0);
  if (seq !== pool.commit_seq) {
    seq = pool.commit_seq;
    lay(levels);
    read();
  }
  drawLevels(pool);
  setText(byId("queue-note"), waiting ? `${plural(waiting, "request")} in ${plural(levels.length, "level")}` : "");
}

// A row for each level, and one for each request.
function lay(found) {
  levels = found;
  starts = [];
  total = 0;
  waiting = 0;
  for (const level of levels) {
    starts.push({ row: total, before: waiting });
    total += 1 + level.waiting;
    waiting += level.waiting;
  }
  active = Math.max(0, Math.min(active, total - 1));
  draw();
}

// What stands in a row: a level's heading, or a request that is known or not yet.
function at(index) {
  let i = levels.length - 1;
  while (i > 0 && starts[i].row > index) i -= 1;
  const level = levels[i];
  const offset = index - starts[i].row - 1;
  if (offset < 0) return { level };
  const first = Math.floor(offset / size) * size;
  const known = windows.get(`${level.level}/${first}`);
  return { level, offset, first, position: starts[i].before + offset + 1, request: known?.rows[offset - first], old: known?.seq !== seq };
}

// The style sheet has two heights; asking for the computed one at every drawing would cost a layout.
const narrow = matchMedia("(max-width: 600px)");
const rowHeight = () => (narrow.matches ? 50 : 28);

function draw() {
  if (!frame) frame = requestAnimationFrame(drawNow);
}

function drawNow() {
  frame = 0;
  const began = performance.now();
  const height = rowHeight();
  const top = grid.scrollTop;
  body.style.height = `${total ? total * height : 60}px`;
  grid.setAttribute("aria-rowcount", total + 1);
  const first = Math.max(0, Math.floor(top / height) - MARGIN_ROWS);
  const last = Math.min(total, Math.ceil((top + view) / height) + MARGIN_ROWS);
  wanted.clear();
  for (let n = 0; n < Math.max(last - first, rows.length); n += 1) {
    const index = first + n;
    if (index >= last) rows[n].hidden = true;
    else drawRow((rows[n] ??= newRow()), index, height);
  }
  drawEmpty();
  const node = total ? rows.find((row) => !row.hidden && row.index === active) : null;
  if (node) grid.setAttribute("aria-activedescendant", node.id);
  else grid.removeAttribute("aria-activedescendant");
  if (wanted.size) read();
  performance.measure("laps queue", { start: began });
}

function drawEmpty() {
  let note = body.querySelector(".empty");
  if (total) note?.parentElement.remove();
  else if (!note) {
    note = h("div", { role: "gridcell", class: "empty", text: "Nothing waits." });
    body.append(h("div", { role: "row" }, note));
  }
}

function newRow() {
  const row = h("div", { class: "row", role: "row", id: `queue-row-${rows.length}` });
  row.cells = COLUMNS.map(([name, kind]) => h("span", { class: `${kind} c-${name}`, role: "gridcell" }));
  row.cells.push(h("span", { class: "c-short", role: "gridcell" }));
  row.title_ = h("span", { role: "gridcell" });
  body.append(row);
  return row;
}

function drawRow(row, index, height) {
  const { level, offset, first, position, request, old } = at(index);
  row.hidden = false;
  row.index = index;
  row.request = request;
  row.style.transform = `translateY(${index * height}px)`;
  row.setAttribute("aria-rowindex", index + 2);
  const isActive = index === active ? " active" : "";
  const isLevel = offset === undefined;
  if (row.isLevel !== isLevel) {
    row.replaceChildren(...(isLevel ? [row.title_] : row.cells));
    row.isLevel = isLevel;
  }
  if (isLevel) {
    setClass(row, `row level${isActive}`);
    setText(row.title_, `Level ${level.level}${level.threshold_s ? `, below ${bound(level.threshold_s)}` : ""}: ${plural(level.waiting, "request")}`);
    return;
  }
  if (!request || old) wanted.add(`${level.level}/${first}`);
  setClass(row, `row${isActive}${request && request.request_id === chosen ? " chosen" : ""}`);
  const texts = request ? cellTexts(request, position) : [count(position), "…", "", "", "", "", "", "", "", "", "", ""];
  row.cells.forEach((cell, i) => setText(cell, texts[i]));
  const kind = request ? state(request)[2] : "";
  setClass(row.cells[2], `c-state ${kind}`);
  row.cells[1].title = request?.request_id ?? "";
  row.cells[10].title = texts[10];
}

function cellTexts(item, position) {
  const [sign, word] = state(item);
  const needs = seconds(item.perceived_service_s);
  const made = `${count(item.output_tokens)}/~${count(item.predicted_output_tokens)}/${count(item.max_tokens)}`;
  const waits = age(item.arrival_s, now());
  return [
    count(position), item.request_id, `${sign} ${word}`, rank(item.rank), needs, seconds(item.attained_service_s), made,
    acceptance(item), item.perceptible ? "yes" : "no", waits, brief(item),
    `needs ${needs}${item.perceptible ? "" : " ?"} · ${count(item.output_tokens)}/${count(item.max_tokens)} tokens · ${waits} old · ${brief(item)}`,
  ];
}

function drawLevels(pool) {
  const most = Math.max(1, ...pool.levels.map((level) => level.waiting));
  const holder = byId("levels");
  while (holder.children.length > pool.levels.length) holder.lastChild.remove();
  pool.levels.forEach((level, i) => {
    let button = holder.children[i];
    if (!button) {
      button = h("button", { type: "button", on: { click: () => jump(button.level) } }, h("span"), h("b"), h("span", { class: "meter" }, h("i")));
      holder.append(button);
    }
    button.level = level.level;
    const from_s = pool.levels[i - 1]?.threshold_s;
    const range = level.threshold_s ? `< ${bound(level.threshold_s)}` : from_s ? `≥ ${bound(from_s)}` : "";
    setText(button.children[0], `L${level.level} ${range}`);
    setText(button.children[1], count(level.waiting));
    button.children[2].firstChild.style.width = `${(100 * level.waiting) / most}%`;
  });
}

export function jump(number) {
  const i = levels.findIndex((level) => level.level >= number);
  if (i < 0) return;
  active = starts[i].row;
  grid.scrollTop = active * rowHeight();
  grid.focus({ preventScroll: true });
  draw();
}

function onKey(event) {
  const page = Math.max(1, Math.floor(grid.clientHeight / rowHeight()) - 2);
  const steps = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: page, PageUp: -page, Home: -total, End: total };
  if (event.key === "Enter") {
    const { request } = total ? at(active) : {};
    if (request) open(request.request_id);
  } else if (steps[event.key] !== undefined && !event.ctrlKey && !event.metaKey && !event.altKey) {
    move(steps[event.key]);
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

export function move(by) {
  active = Math.max(0, Math.min(total - 1, active + by));
  const height = rowHeight();
  const top = active * height;
  const head = grid.firstElementChild.offsetHeight;
  if (top < grid.scrollTop) grid.scrollTop = top;
  else if (top + height + head > grid.scrollTop + grid.clientHeight) grid.scrollTop = top + height + head - grid.clientHeight;
  draw();
}

// Reads the windows in view that are not of the newest commit, at most every EACH_MS.
function read() {
  if (timer || document.hidden || !live()) return;
  const known = [...wanted].some((name) => !windows.has(name));
  const wait_ms = known ? Math.min(60, EACH_MS) : Math.max(0, lastRead_ms + EACH_MS - performance.now());
  timer = setTimeout(readNow, wait_ms);
}

async function readNow() {
  const names = [...wanted];
  lastRead_ms = performance.now();
  try {
    await Promise.all(names.map(readOne));
  } catch {
    // The stream tells what is wrong; the next picture asks again.
  } finally {
    timer = 0;
  }
  while (windows.size > KEPT_WINDOWS) windows.delete(windows.keys().next().value);
  draw();
}

async function readOne(name) {
  const [level, offset] = name.split("/").map(Number);
  const answer = await queueWindow(level, offset);
  windows.delete(name);
  // A newer picture may have come meanwhile: then these rows are old at once, and are asked for again.
  windows.set(name, { rows: answer.rows, seq: answer.commit_seq });
}
