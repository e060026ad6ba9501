// Questions to the gateway. The key stays in this tab's session storage and travels as a bearer token only.

const KEY = "laps.key";
const RETRY_FIRST_MS = 500;
const RETRY_MOST_MS = 8000;
const SILENCE_MS = 12_000; // the stream says at least every 5 s that it is alive

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

function headers(more = {}) {
  return key.get() ? { Authorization: `Bearer ${key.get()}`, ...more } : more;
}

async function refusal(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not ours: a proxy's page.
  }
  return new Refused(response.status, message);
}

async function ask(path, options = {}) {
  const response = await fetch(`/console/api/${path}`, { cache: "no-store", ...options, headers: headers(options.headers) });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

const one = (id) => `requests/${encodeURIComponent(id)}`;

export const session = () => ask("session");
export const queueWindow = (level, offset) => ask(`queue?level=${level}&offset=${offset}`);
export const timeline = (id) => ask(one(id));
export const text = (id) => ask(`${one(id)}/text`);
export const cancel = (id) =>
  ask(`${one(id)}/cancel`, { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" });

// Server-sent events by fetch, because EventSource can carry no key. Comes back by itself.
// `onPicture(data)`, `onState("lost" | "key", message)`. Returns a function that ends it.
export function watch(onPicture, onState) {
  let stopped = false;
  let pause_ms = RETRY_FIRST_MS;
  let aborter = null;

  async function once() {
    aborter = new AbortController();
    let silence = setTimeout(() => aborter.abort(), SILENCE_MS);
    try {
      const response = await fetch("/console/api/watch", { cache: "no-store", headers: headers(), signal: aborter.signal });
      if (!response.ok) throw await refusal(response);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        clearTimeout(silence);
        silence = setTimeout(() => aborter.abort(), SILENCE_MS);
        pause_ms = RETRY_FIRST_MS;
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        // Of several that have gathered only the newest is worth drawing.
        const last = events.filter((event) => event.startsWith("data: ")).pop();
        if (last) onPicture(JSON.parse(last.slice(6)));
      }
    } finally {
      clearTimeout(silence);
    }
  }

  (async () => {
    while (!stopped) {
      let message = "The gateway closed the stream.";
      try {
        await once();
      } catch (error) {
        if (error.status === 401 || error.status === 403) return onState("key", error.message);
        message = error instanceof Refused ? error.message : "The gateway cannot be reached.";
      }
      if (stopped) return;
      onState("lost", message);
      await new Promise((wake) => setTimeout(wake, pause_ms));
      pause_ms = Math.min(2 * pause_ms, RETRY_MOST_MS);
    }
  })();
  return () => {
    stopped = true;
    aborter?.abort();
  };
}
