// Starts the page: the stream, the parts that it feeds, keys, theme, address.

import * as api from "./api.js";
import { byId, h, setText } from "./dom.js";
import * as lists from "./lists.js";
import * as queue from "./queue.js";
import * as request from "./request.js";
import * as summary from "./summary.js";

const THEMES = ["auto", "light", "dark"];
const KEYS = [
  ["?", "this list"], ["/", "open a request by its id"], ["q", "to the queue"], ["↑ ↓ j k", "move in the queue"],
  ["PgUp PgDn Home End", "move far in the queue"], ["Enter", "open the chosen request"], ["Esc", "close it"], ["0 … 9", "to a queue level"],
  ["s", "to the slots"], ["f", "to the finished"], ["p", "pause and go on"], ["t", "theme"], ["c", "cancel the open request, where allowed"],
];
const page = { session: {}, picture: null, offset_s: 0, paused: false, connected: false };
const now_s = () => Date.now() / 1e3 + page.offset_s;
const openRequest = (id) => (location.hash = `#/request/${encodeURIComponent(id)}`);

function show(data) {
  if (data.problem) return setState("lost", data.problem);
  page.offset_s = data.time_s - Date.now() / 1e3;
  page.picture = data;
  setState("live", "");
  if (!page.paused) draw();
}

function draw() {
  const began = performance.now();
  const { picture } = page;
  const pool = picture.pools[0];
  setText(byId("pool"), pool.pool);
  setText(byId("policy"), `${pool.policy}${page.session.model ? `, model ${page.session.model}` : ""}`);
  summary.update(picture);
  queue.update(pool);
  tick();
  performance.measure("laps update", { start: began });
}

// What changes with the time alone.
function tick() {
  if (!page.picture || page.paused) return;
  request.update(page.picture);
  summary.updateHealth(page.picture, now_s());
  lists.updateSlots(page.picture, now_s(), openRequest);
  lists.updateFinished(page.picture, now_s(), openRequest);
}

function setState(state, message) {
  page.connected = state === "live";
  const live = byId("live");
  live.dataset.state = page.paused ? "paused" : state;
  setText(live, page.paused ? "Paused" : { live: "Live", lost: "Not live", waiting: "Connecting" }[state]);
  byId("problem").hidden = !message;
  setText(byId("problem"), message ? `What is shown may be old. ${message}` : "");
}

function pause() {
  page.paused = !page.paused;
  byId("pause").setAttribute("aria-pressed", page.paused);
  setText(byId("pause"), page.paused ? "Go on" : "Pause");
  setState(page.connected ? "live" : "lost", "");
  if (!page.paused && page.picture) draw();
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  localStorage.setItem("laps.theme", theme);
  setText(byId("theme"), theme[0].toUpperCase() + theme.slice(1));
  byId("theme").setAttribute("aria-label", `Theme: ${theme}`);
}
const nextTheme = () => setTheme(THEMES[(THEMES.indexOf(localStorage.getItem("laps.theme") ?? "auto") + 1) % THEMES.length]);

let returnTo = null;
function route() {
  const found = /^#\/request\/(.+)$/.exec(location.hash);
  if (!found) return request.close();
  if (!request.isOpen()) returnTo = document.activeElement;
  let id = found[1];
  try {
    id = decodeURIComponent(id);
  } catch {
    // As it stands.
  }
  queue.choose(id);
  request.open(id, page.session);
}

function closed() {
  if (location.hash) history.pushState(null, "", location.pathname);
  queue.choose("");
  (returnTo?.isConnected && returnTo !== document.body ? returnTo : byId("queue")).focus({ preventScroll: true });
}

const COMMANDS = {
  "?": () => byId("help").showModal(), "/": () => byId("find-id").focus(), q: queue.focus, p: pause, t: nextTheme, c: request.askCancel,
  s: () => byId("slots").focus(), f: () => byId("finished").focus(),
  j: () => queue.move(1), k: () => queue.move(-1),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (event.target.id === "find-id") event.target.blur();
    return request.close();
  }
  if (event.target.matches("input, textarea") || !byId("keys-on").checked) return;
  const run = /^[0-9]$/.test(event.key) ? () => queue.jump(Number(event.key)) : COMMANDS[event.key];
  if (!run) return;
  event.preventDefault();
  run();
}

async function login(message) {
  setText(byId("login-problem"), api.key.get() ? message : "");
  const dialog = byId("login");
  if (!dialog.open) dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  api.key.set(byId("key").value.trim());
  byId("key").value = "";
}

async function start() {
  for (;;) {
    try {
      page.session = await api.session();
      break;
    } catch (error) {
      if (error.status === 401 || error.status === 403) await login(error.message);
      else {
        setState("lost", error.message);
        await new Promise((wake) => setTimeout(wake, 2000));
      }
    }
  }
  queue.setWindowRows(page.session.window_rows);
  api.watch(show, async (state, message) => {
    if (state !== "key") return setState(state, message);
    await login(message);
    start();
  });
  route();
}

setTheme(localStorage.getItem("laps.theme") ?? "auto");
byId("keys").append(...KEYS.flatMap(([names, text]) => [h("dt", {}, ...names.split(" ").map((name) => h("kbd", { text: name }))), h("dd", { text })]));
byId("keys-on").checked = localStorage.getItem("laps.keys") !== "off";
byId("keys-on").addEventListener("change", (event) => localStorage.setItem("laps.keys", event.target.checked ? "on" : "off"));
byId("help-open").addEventListener("click", COMMANDS["?"]);
byId("theme").addEventListener("click", nextTheme);
byId("pause").addEventListener("click", pause);
byId("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = byId("find-id").value.trim();
  if (id) openRequest(id);
});
summary.build();
queue.build({ now: now_s, open: openRequest, live: () => page.connected && !page.paused });
request.build({ onClosed: closed });
addEventListener("hashchange", route);
addEventListener("popstate", route);
document.addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", () => !document.hidden && page.picture && !page.paused && draw());
setInterval(tick, 1000);
start();
