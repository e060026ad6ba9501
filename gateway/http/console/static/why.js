// Why a request stands where it stands, in sentences made from what the scheduler has stored about it.

import { acceptance, bound, count, plural, rank, seconds, share } from "./format.js";

const BY_NEED = new Set(["laps-sd", "srpt", "oracle"]);
const RANKS = {
  "laps-sd": (row) => `Rank ${rank(row.rank)}: estimated seconds that it still needs, least first.`,
  "laps-sd-paper": (row) =>
    row.perceptible
      ? `Rank ${rank(row.rank)}: estimated seconds that it still needs, least first.`
      : "Rank: not perceptible yet, so it stands behind those that are, in order of arrival.",
  fcfs: (row) => `Rank ${rank(row.rank)}: its place in the order of arrival.`,
  las: (row) => `Rank ${rank(row.rank)}: its place in the order of arrival; its level counts first.`,
  fastserve: (row) => `Rank ${rank(row.rank)}: when it entered this level; its level counts first.`,
  sjf: (row) => `Rank ${rank(row.rank)}: its predicted output in tokens, least first.`,
  srpt: (row) => `Rank ${rank(row.rank)}: predicted tokens that it still needs, least first.`,
};

function levelSentence(row, pool) {
  const limits = pool.levels.map((level) => level.threshold_s);
  if (!limits.some((limit) => limit > 0)) return null;
  const from_s = row.level > 0 ? limits[row.level - 1] : 0;
  const to_s = limits[row.level] ?? 0;
  const range = !from_s ? `less than ${bound(to_s)}` : to_s > 0 ? `${bound(from_s)} to ${bound(to_s)}` : `${bound(from_s)} and more`;
  const what = BY_NEED.has(pool.policy) ? "service that is still needed" : "service had";
  return `Level ${row.level}: for ${range} of ${what}.`;
}

function placeSentence(row, pool, position) {
  if (position === null || position === undefined) return null;
  const above = pool.levels.reduce((sum, each) => sum + (each.level < row.level ? each.waiting : 0), 0);
  const first = `${plural(position, "request waits", "requests wait")} before it at its level`;
  return above ? `${first}, ${count(above)} at levels that go first.` : `${first}.`;
}

function waitSentence(pool, workers) {
  const slots = workers.reduce((sum, worker) => sum + worker.slots.length, 0);
  if (!pool.leader) return "Waits because no scheduler leads the pool.";
  if (!slots) return "Waits because no worker is in session.";
  if (workers.every((worker) => worker.draining)) return "Waits because every worker is draining.";
  if (pool.running >= slots) return slots === 1 ? "Waits because the only slot is taken." : `Waits because all ${count(slots)} slots are taken.`;
  return `${plural(slots - pool.running, "slot")} free: those before it get them first.`;
}

function needSentence(row) {
  const length = `${count(row.output_tokens)} of about ${count(row.predicted_output_tokens)} tokens (at most ${count(row.max_tokens)})`;
  const accepted = `${acceptance(row)} of drafted tokens accepted`;
  if (row.perceptible) {
    return `Perceptible: needs about ${seconds(row.perceived_service_s)} more; ${length}, ${accepted}.`;
  }
  return `Not perceptible: how much it needs is uncertain, about ${seconds(row.perceived_service_s)} more; ${length}, ${accepted}.`;
}

// `position`: requests before it at its level, if that is known.
export function why(row, pool, workers, position) {
  if (row.state === "finished") {
    const ended = row.error ? `${row.finish_reason}: ${row.error}` : row.finish_reason;
    return [`Ended: ${ended}.`, preempted(row)].filter(Boolean);
  }
  if (row.state === "running") {
    return [
      `Runs in slot ${row.slot} of ${row.worker_id}.`, needSentence(row), levelSentence(row, pool), preempted(row),
    ].filter(Boolean);
  }
  const overdue = row.rank <= -1e14;
  return [
    waitSentence(pool, workers),
    placeSentence(row, pool, position),
    row.priority ? `Priority ${row.priority}: goes ${row.priority > 0 ? "before" : "behind"} priority 0, whatever the level.` : null,
    overdue ? "Has waited longer than the starvation bound: goes before all others of its priority." : levelSentence(row, pool),
    overdue ? null : (RANKS[pool.policy] ?? ((each) => `Rank ${rank(each.rank)}: lower goes first.`))(row),
    needSentence(row),
    preempted(row),
  ].filter(Boolean);
}

function preempted(row) {
  if (row.preempted_because) {
    const times = row.preemptions ? `Preempted ${plural(row.preemptions, "time")}, the last time because` : "Lost its slot because";
    return `${times}: ${row.preempted_because}`;
  }
  return null;
}

// One line for a row of the queue.
export function brief(row) {
  if (row.rank <= -1e14) return "overdue: goes first";
  if (row.preempted_because) return row.preempted_because;
  if (row.priority) return `priority ${row.priority}`;
  if (!row.num_steps) return "has not run yet";
  return row.perceptible ? `about ${count(row.predicted_output_tokens)} tokens, ${share(row.acceptance_estimate)}` : "length uncertain";
}
