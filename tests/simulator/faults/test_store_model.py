"""The simulator's store and the real functions in a real server: the same calls must get the same answers
and leave the same keys, refusals included."""

from __future__ import annotations

import random
import struct
import uuid
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import msgpack
import pytest
import redis

from scheduler_svc.store import keys, library
from scheduler_svc.store.server import LocalServer, valkey_binary
from simulator.faults import store_reading
from simulator.faults.store_model import Entry, Refusal, StoreModel

NOW_MS = 1_700_000_000_000
FIELDS = (
    "state", "log_entries", "output_tokens", "queue", "priority", "arrival_seq", "perceived_s", "digest"
)  # fmt: skip
LONG_MS, PAST_MS = 10_000_000, 0


@pytest.fixture(scope="module")
def client() -> Iterator[redis.Redis]:
    with (
        LocalServer(binary=valkey_binary(), appendfsync=None) as server,
        redis.Redis.from_url(server.url, protocol=2) as client,
    ):
        for name in library.LIBRARIES:
            client.function_load(library.source(name), replace=True)
        yield client


class Both:
    """The real functions and the model, side by side."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.pool = uuid.uuid4().hex
        self.model = StoreModel(lambda: NOW_MS)

    def call(self, function: str, *args: Any) -> Any:
        """Answers must agree; of refusals the whole text. Instants of the server's own clock may differ."""
        try:
            real: Any = self.client.fcall(function, 1, keys.meta(self.pool), *args)
        except redis.ResponseError as error:
            real = str(error)
        try:
            modelled: Any = self.model.call(function, *args)
        except Refusal as refusal:
            modelled = str(refusal)
        real, modelled = _plain(real), _plain(modelled)
        if function == "laps_lead" and isinstance(real, list):
            real[2] = modelled[2] = "expiry"
        if function == "laps_renew" and not isinstance(real, str):
            real = modelled = "expiry" if isinstance(modelled, int) else modelled
        assert real == modelled, (function, args[:5])
        return modelled

    def compare_keys(self) -> None:
        assert _of_model(self.model) == _of_server(self.client, self.pool)

    def compare_readings(self, request_ids: list[str]) -> None:
        epoch = int(self.model.keys.leader.get("epoch", "0"))
        for after in ("-", "(3-0"):
            self._compare_reading("laps_journal", epoch, after, 4)
        self._compare_reading("laps_learnt", epoch)
        self._compare_reading("laps_load_waiting", epoch, 0, 500, *FIELDS)
        self._compare_reading("laps_load_finished", epoch, 0, 500, *FIELDS)
        live = [name for name in request_ids if name in self.model.keys.live]
        self._compare_reading("laps_load_requests", epoch, len(FIELDS), *FIELDS, *live)
        for other in (epoch - 1, epoch + 1):
            self._compare_reading("laps_learnt", other)
        for request_id in request_ids:
            for offset in (0, 1, 3, 7):
                self._compare_reading("laps_read", request_id, offset, 5000, 1)

    def _compare_reading(self, function: str, *args: Any) -> None:
        real: Any
        try:
            packed = self.client.execute_command("FCALL_RO", function, 1, keys.meta(self.pool), *args)
            real = _plain(msgpack.unpackb(packed, raw=True))
        except redis.ResponseError as error:
            real = str(error)
        try:
            modelled = _plain(store_reading.ask(self.model.keys, function, *args))
        except Refusal as refusal:
            modelled = str(refusal)
        if function == "laps_read":
            real[0], modelled[0] = _pairs(real[0]), _pairs(modelled[0])
        if not real:
            real = []
        assert real == modelled, (function, args)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value == {}:
        return []  # an empty Lua table
    return value


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _of_model(model: StoreModel) -> dict[str, Any]:
    stored, found = model.keys, {}
    sets = {f"queue:{level}": waiting for level, waiting in stored.queues.items()}
    sets |= {name: getattr(stored, name) for name in ("live", "leases", "finished", "workers")}
    found = {name: dict(members) for name, members in sets.items() if members}
    hashes = {
        "meta": stored.meta,
        "leader": stored.leader,
        "epochs": stored.epochs,
        "stopped": stored.stopped,
        "learnt": stored.learnt,
    }
    found |= {name: dict(fields) for name, fields in hashes.items() if fields}
    for kind in ("request", "worker", "prompt", "params"):
        found |= {f"{kind}:{name}": value for name, value in getattr(stored, kind).items()}
    for name, log in stored.tokens.items():
        found[f"tokens:{name}"] = log
    if stored.journal:
        found["journal"] = stored.journal
    found.get("leader", {}).pop("expires_ms", None)
    found.get("stopped", {}).pop("at_ms", None)
    return found


def _of_server(client: redis.Redis, pool: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    prefix = keys.prefix(pool)
    for key in client.scan_iter(match=prefix + "*", count=1000):
        name = key.decode().removeprefix(prefix)
        kind = client.type(key)
        if name == "events":
            continue
        if kind == b"zset":
            found[name] = {
                member.decode(): score for member, score in client.zrange(key, 0, -1, withscores=True)
            }
        elif kind == b"hash":
            found[name] = {field.decode(): value.decode() for field, value in client.hgetall(key).items()}
        elif name == "journal":
            entries = client.xrange(key)
            if entries:  # a stream that was trimmed to nothing is still a key
                found[name] = [(int(at.split(b"-")[0]), fields[b"rows"]) for at, fields in entries]
        elif kind == b"stream":
            found[name] = [_entry(number, fields) for number, fields in client.xrange(key)]
        else:
            found[name] = client.get(key).decode()
    found.get("leader", {}).pop("expires_ms", None)
    found.get("stopped", {}).pop("at_ms", None)
    return found


def _entry(number: bytes, fields: dict[bytes, bytes]) -> Entry:
    logprobs = fields.get(b"logprobs", b"").decode("utf-8", "surrogateescape")
    return Entry(int(number.split(b"-")[0]), int(fields[b"offset"]), fields[b"tokens"].decode(), logprobs)


class Maker:
    """Random calls: mostly what a leader would say, often not."""

    def __init__(self, seed: int, model: StoreModel) -> None:
        self.rng = random.Random(seed)
        self.model = model
        self.ids = [f"r{n}" for n in range(6)]
        self.logs: dict[str, list[int]] = {}
        """Tokens before each entry and after the last, as this maker believes."""
        self.seq = 0
        self.epoch = 0
        self.timeline = 1
        self.term = ""
        self.holder = "a"
        self.made: deque[tuple[Any, ...]] = deque(maxlen=2)
        """The last commits that it has asked for."""

    def seen(self) -> tuple[int, int, int, str]:
        """What its calls say that it has seen: mostly what it has."""
        epoch = self.mostly(self.epoch, self.epoch + 5)
        term = self.rng.choices((self.term, "", "another"), (94, 4, 2))[0]
        return self.mostly(self.timeline, 0, 9), epoch, self.mostly(self.seq, self.seq + 5), term

    def look(self) -> None:
        """What it believes of the logs becomes what is stored."""
        self.logs = {
            name: [0, *(entry.offset + len(entry.tokens.split()) for entry in log)]
            for name, log in self.model.keys.tokens.items()
        }

    def mostly(self, right: Any, *wrong: Any) -> Any:
        return right if self.rng.random() < 0.98 else self.rng.choice(wrong)

    def commit(self) -> tuple[Any, ...]:
        rng = self.rng
        if self.made and rng.random() < 0.1:
            return rng.choice(self.made)
        stored = self.model.keys
        new = [i for i in self.ids if i not in stored.request]

        def some(share: float, right: Collection[str]) -> list[str]:
            """Mostly of those for which it is right."""
            return [i for i in self.ids if rng.random() < (share if i in right else 0.004)]

        submitted = [self._submission(i) for i in some(0.15, new)]
        live = {*stored.live, *(each[0] for each in submitted)}
        appended: list[Any] = []
        for request_id in some(0.3, live):
            for _ in range(rng.choice((1, 1, 2))):
                appended += self._entry(request_id)
        changed = [
            [i, rng.uniform(0.0, 9.0), ["steps", str(rng.randint(0, 9))], *self._end(i)]
            for i in some(0.15, live)
        ]
        finished = [
            [i, NOW_MS + rng.randint(0, 5), ["state", "finished"], *self._end(i)] for i in some(0.08, live)
        ]
        moves = [self._move(i) for i in some(0.2, live)]
        leased = [value for i in some(0.15, live) for value in (NOW_MS + rng.randint(0, 9), i)]
        workers = [
            [f"w{n}", NOW_MS - rng.choice((0, 4_000_000)), ["slots", "2"]]
            for n in range(2)
            if rng.random() < 0.2
        ]
        gone = ["w1"] if rng.random() < 0.05 else []
        unleased, forgotten = some(0.1, live), some(0.2, stored.finished)
        body = [NOW_MS, submitted, appended, changed, moves, leased, unleased, finished]
        body += [forgotten, workers, gone, [["kind", "leased"]], ["k", str(rng.randint(0, 9))]]
        body.append(rng.choice((False, False, max(1, self.seq - 2), self.seq + 2)))
        packed = msgpack.Packer(use_bin_type=False).pack(body)
        seq = self.mostly(self.seq + 1, self.seq, self.seq + 2, 1)
        digest = self.mostly(uuid.UUID(int=rng.getrandbits(128)).hex, "same")
        acknowledged = self.mostly(self.seq, self.seq + 1, 0)
        holder = self.mostly(self.holder, "z")
        call = (
            self.mostly(self.epoch, self.epoch + 1, self.epoch - 1),
            holder,
            seq,
            acknowledged,
            digest,
            packed,
            rng.choice((b"", rng.randbytes(8))),
        )
        self.made.append(call)
        return call

    def _submission(self, request_id: str) -> list[Any]:
        rng = self.rng
        priority, arrival = rng.randint(-2, 2), rng.randint(1, 99)
        perceived_s = rng.uniform(0.0, 9.0)
        values = ("queued", "0", "0", "", str(priority), str(arrival), repr(perceived_s), "d")
        fields = [text for pair in zip(FIELDS, values, strict=True) for text in pair]
        return [request_id, arrival, priority, perceived_s, "1 2 3", "{}", fields]

    def _end(self, request_id: str) -> tuple[int, int]:
        """Entries and tokens of its log."""
        log = self.logs.get(request_id, [0])
        return self.mostly(len(log) - 1, len(log)), self.mostly(log[-1], log[-1] + 1)

    def _entry(self, request_id: str) -> list[Any]:
        rng = self.rng
        log = self.logs.setdefault(request_id, [0])
        number = self.mostly(len(log), len(log) + 1, max(1, len(log) - 1))
        offset = self.mostly(log[min(number, len(log)) - 1], log[-1] + 1)
        count = rng.randint(1, 3)
        tokens = " ".join(str(self.mostly(offset + n, 77)) for n in range(count))
        if number == len(log):
            log.append(offset + count)
        logprobs = rng.choice((b"", b"", struct.pack("<d", rng.random())))
        return [
            request_id,
            number,
            offset,
            count,
            tokens,
            logprobs,
        ]

    def _move(self, request_id: str) -> list[Any]:
        level = self.rng.choice((False, 0, 1, 2))
        rank = self.rng.choice((0.5, -3.25, 1e12, 7.0))
        return [request_id, level, rank, repr(rank)]


def holder_of(rng: random.Random) -> str:
    return rng.choice(("a", "b"))


@pytest.mark.parametrize("seed", range(8))
def test_the_same_calls_get_the_same_answers_and_leave_the_same_keys(client: redis.Redis, seed: int) -> None:
    both = Both(client)
    maker = Maker(seed, both.model)
    rng = maker.rng
    answers: dict[str, int] = {}

    def count(answer: Any) -> None:
        word = answer.split()[0] if isinstance(answer, str) else "taken" if answer[1] else "repeated"
        answers[word] = answers.get(word, 0) + 1

    for step in range(170):
        kind = rng.random()
        if maker.epoch == 0 or kind < 0.05:
            holder = holder_of(rng)
            ttl_ms = rng.choice((LONG_MS, PAST_MS))
            answer = both.call("laps_lead", holder, "here", ttl_ms, *maker.seen(), f"term-{step}")
            if isinstance(answer, list) and answer[0] == 1:
                maker.epoch, maker.holder, maker.seq = answer[1], holder, answer[3]
                maker.term = f"term-{step}"
        elif kind < 0.10:
            both.call("laps_renew", maker.mostly(maker.epoch, 0, 99), maker.holder, LONG_MS, *maker.seen())
        elif kind < 0.12:
            both.call("laps_describe", maker.epoch, maker.holder, "fcfs", "[]")
        elif kind < 0.125:
            both.call("laps_stop", holder_of(rng), "HISTORY_WENT_BACK", *maker.seen())
        elif kind < 0.18:
            maker.timeline = both.call("laps_resume", "operator") or maker.timeline
        elif kind < 0.19:
            both.call("laps_resign", maker.mostly(maker.epoch, 0), maker.holder)
        else:
            commit = maker.commit()
            answer = both.call("laps_commit", *commit)
            count(answer)
            if isinstance(answer, list):
                maker.seq = max(maker.seq, answer[0])
            maker.look()
        if step % 10 == 0:
            both.compare_keys()
            both.compare_readings(maker.ids)
    both.compare_keys()
    assert answers.get("taken", 0) > 10, answers


def test_every_refusal_is_met(client: redis.Redis) -> None:
    met: set[str] = set()
    for seed in range(100, 120):
        both = Both(client)
        maker = Maker(seed, both.model)
        answer = both.call("laps_lead", "a", "here", LONG_MS, 0, 0, 0, "", "term")
        maker.epoch = answer[1]
        for _ in range(120):
            answer = both.call("laps_commit", *maker.commit())
            if isinstance(answer, list):
                repeated = "repeated" if answer[0] == maker.seq else "the one before repeated"
                met.add("taken" if answer[1] else repeated)
                maker.seq = max(maker.seq, answer[0])
            else:
                met.add(answer.split()[0])
            maker.look()
        both.compare_keys()
    refusals = "STALE_EPOCH HISTORY_WENT_BACK SEQ_GAP SEQ_CONFLICT LOG_GAP LOG_CONFLICT UNKNOWN_REQUEST"
    refusals += " REQUEST_EXISTS ALREADY_FINISHED NOT_FINISHED"
    assert met >= {"taken", "repeated", "the one before repeated", *refusals.split()}
