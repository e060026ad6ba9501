// Numbers and times as a person reads them.

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export const count = (value) => whole.format(value);
export const share = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(0)} %`);

export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size < 0.001) return "0 s";
  if (size < 1) return `${Math.round(value * 1e3)} ms`;
  if (size < 10) return `${value.toFixed(2)} s`;
  if (size < 100) return `${value.toFixed(1)} s`;
  if (size < 5400) return `${(value / 60).toFixed(1)} min`;
  if (size < 172800) return `${(value / 3600).toFixed(1)} h`;
  return `${(value / 86400).toFixed(1)} d`;
}

// A setting, such as a level's bound: without the zeros that a measured value would have.
export const bound = (value) => (value < 1 ? `${Number((value * 1e3).toPrecision(3))} ms` : `${Number(value.toPrecision(3))} s`);

export const ms = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(1)} ms`;

// An age changes every second: shown without fractions.
export const age = (since_s, now_s) => {
  if (!since_s) return "–";
  const passed_s = Math.max(now_s - since_s, 0);
  return passed_s < 100 ? `${Math.floor(passed_s)} s` : seconds(passed_s);
};

export function rank(value) {
  if (value <= -1e14) return "overdue";
  if (Number.isInteger(value)) return count(value);
  return value >= 1000 ? count(value) : value.toPrecision(3);
}

export const clock = (instant_s) => (instant_s ? new Date(instant_s * 1e3).toLocaleTimeString("en-GB") : "–");

// Measured where there is something measured; an estimate carries "~".
export function acceptance(row) {
  if (row.num_draft_tokens) return share(row.num_accepted_tokens / row.num_draft_tokens);
  return `~${share(row.acceptance_estimate)}`;
}

export const perStep = (row) => (row.num_steps ? (1 + row.num_accepted_tokens / row.num_steps).toFixed(2) : "–");
export const tokens = (row) => `${count(row.output_tokens)} / ${count(row.max_tokens)}`;
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

const STATES = {
  queued: ["◦", "queued", "quiet"],
  running: ["▶", "running", "run"],
  preempted: ["↺", "preempted", "hold"],
};
const ENDINGS = {
  stop: ["■", "stop", "good"],
  length: ["■", "length", "good"],
  cancelled: ["⊘", "cancelled", "quiet"],
  deadline: ["▲", "deadline", "hold"],
  error: ["✕", "error", "bad"],
};

// Sign, word and class of a request's state: never the colour alone.
export function state(row) {
  return (row.state === "finished" ? ENDINGS[row.finish_reason] : STATES[row.state]) ?? ["?", row.state, "quiet"];
}
