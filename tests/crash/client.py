"""The load, and the witness: a client that knows only the documented HTTP API.

    python client.py --url http://127.0.0.1:8000 --history H.jsonl --seed 1 --stop-file STOP
    python client.py --url … --history U.jsonl --twins H.jsonl      the same rollouts, undisturbed

Nothing of everstep is imported; HTTP is the standard library's. Every call is written down before
it is made and after it was answered (history.py says how), and what is acknowledged was synced to
the file before. A call without an answer has an unknown outcome: it is made again with the same
key until its outcome is known. Once the stop file is there no new group is submitted, and the
client ends when it has been given everything that was accepted. A client that was killed goes on
by what its history says.
"""

import argparse
import http.client
import json
import os
import random
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from history import read_records

Record = dict[str, Any]
TIMEOUT_S = 20.0
RETRY_S = 0.04
VOCABULARY = 490


class Unanswered(Exception):
    """No answer, half an answer, or one that says "not now": the outcome is unknown."""


class Refused(Exception):
    """The server has said no."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status} {body[:300]}")
        self.status = status


class Api:
    """One call, one connection: a killed server leaves nothing half open."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80

    def call(self, method: str, path: str, body: Any = None, *, key: str | None = None) -> Any:
        try:
            connection, response = self._send(method, path, body, key)
            with connection:
                text = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise Unanswered(repr(error)) from None
        return self._read(response.status, text)

    def events(self, path: str) -> Iterator[Record]:
        """Server-sent events until the stream ends; comments and heartbeats are passed over."""
        try:
            connection, response = self._send("GET", path, None, None)
            with connection:
                if response.status != 200:
                    self._read(response.status, response.read().decode())
                for line in response:
                    if line.startswith(b"data:"):
                        if line.strip() == b"data: [DONE]":
                            return
                        yield json.loads(line[5:])
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unanswered(repr(error)) from None

    def _send(
        self, method: str, path: str, body: Any, key: str | None
    ) -> tuple["Connection", http.client.HTTPResponse]:
        connection = Connection(self._host, self._port, timeout=TIMEOUT_S)
        headers = {"content-type": "application/json"}
        if key is not None:
            headers["idempotency-key"] = key
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers)
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    @staticmethod
    def _read(status: int, text: str) -> Any:
        if status >= 500 or status == 429:
            raise Unanswered(f"{status} {text[:300]}")
        if status >= 400:
            raise Refused(status, text)
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise Unanswered(f"half an answer: {text[:60]!r}") from None


class Connection(http.client.HTTPConnection):
    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Notebook:
    """The history file. A record is in the system's hands when `write` returns; `sync` waits for
    the disk."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        # a writer that was killed may have left half a record
        size = os.fstat(self._file).st_size
        while size and os.pread(self._file, 1, size - 1) != b"\n":
            size -= 1
        os.truncate(self._file, size)

    def write(self, kind: str, *, sync: bool = False, **fields: Any) -> None:
        record = {"at": time.monotonic_ns(), "kind": kind, **fields}
        os.write(self._file, json.dumps(record).encode() + b"\n")
        if sync:
            os.fsync(self._file)


# what is drawn, and what its rollouts put to the test
SAMPLINGS: list[Record] = [
    {"ignore_eos": True},
    {},
    {"temperature": 0.0, "ignore_eos": True},
    # penalties count prompt and output apart: the border between them must survive
    {"repetition_penalty": 1.3, "ignore_eos": True},
    {"presence_penalty": 0.8, "frequency_penalty": 0.5, "top_k": 40, "ignore_eos": True},
    {"temperature": 0.8, "top_p": 0.7, "repetition_penalty": 1.2},
    {"min_p": 0.05, "temperature": 1.5, "logit_bias": {"7": 2.5, "9": -4.0}, "min_tokens": 30},
    # a stop string over many tokens: what was matched so far must survive
    {"logit_bias": {"97": 9.0, "98": 9.0}, "stop": ["aabbabab"], "ignore_eos": True},
    {"logit_bias": {"97": 9.0, "98": 9.0}, "stop": ["abbab"], "ignore_eos": True},
    # half a character at the end of any token
    {"logit_bias": {str(b): 7.0 for b in (0xC3, 0xA4, 0xE2, 0x82, 0xAC)}, "ignore_eos": True},
]


class Load:
    """Groups in parallel, each from its submission to its acknowledgement."""

    def __init__(self, api: Api, notebook: Notebook, given: argparse.Namespace) -> None:
        self._api, self._notebook, self._given = api, notebook, given
        self._life = f"{given.seed}-{os.getpid()}"
        self._pool = ThreadPoolExecutor(given.groups * given.samples)
        self._names = iter(range(sys.maxsize))
        self._lock = threading.Lock()

    def run(self) -> None:
        left = unfinished(self._given.history)
        self._notebook.write("hello", pid=os.getpid(), left=len(left))
        with ThreadPoolExecutor(self._given.groups) as groups:
            workers = [
                groups.submit(self._work, random.Random(f"{self._life}/{n}"), n, left)
                for n in range(self._given.groups)
            ]
            for worker in workers:
                worker.result()
        while self._list(is_last=True):
            time.sleep(RETRY_S)
        self._pool.shutdown()
        self._notebook.write("done", sync=True)

    def _work(self, rng: random.Random, number: int, left: "list[Unfinished]") -> None:
        """What an earlier life of this client has left, then new groups."""
        for key, body, acking in left[number :: self._given.groups]:
            if acking:
                self._acknowledge(acking)
            else:
                self._see_through(key, body, rng)
        count = 0
        while not self._given.stop_file.exists():
            count += 1
            key = f"{self._life}-{number}-{count}"
            self._see_through(key, self._draw(rng, key), rng)

    def _see_through(self, key: str, body: Record, rng: random.Random) -> None:
        """One group from its submission to its acknowledgement."""
        ids = self._submit(key, body)
        if rng.random() < 0.1:
            # a client that has forgotten that it was answered
            self._submit(key, body)
        following = [
            self._pool.submit(self._follow, rollout_id, body, random.Random(rng.random()))
            for rollout_id in ids
        ]
        for done in following:
            done.result()
        if rng.random() < 0.5:
            self._list()
        self._acknowledge(ids)
        for rollout_id in ids:
            if rng.random() < 0.2:
                self._is_gone(rollout_id)

    def _draw(self, rng: random.Random, key: str) -> Record:
        shared = random.Random(rng.randrange(3))
        prompt = [shared.randrange(VOCABULARY) for _ in range(rng.choice((0, 16, 40)))]
        prompt += [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 12))]
        sampling = {**rng.choice(SAMPLINGS), "max_tokens": rng.randrange(40, self._given.tokens)}
        if rng.random() < 0.3:
            sampling["seed"] = rng.getrandbits(62)
        return {
            "prompt_ids": prompt,
            "samples": rng.randrange(1, self._given.samples + 1),
            "sampling": sampling,
            "metadata": {"key": key, "is_cancelled": rng.random() < 0.03},
        }

    def _submit(self, key: str, body: Record) -> list[str]:
        while True:
            self._notebook.write("submit", phase="invoke", key=key, body=body, sync=True)
            try:
                answer = self._api.call("POST", "/rollouts", body, key=key)
            except Unanswered as error:
                self._notebook.write("submit", phase="unknown", key=key, error=str(error))
                time.sleep(RETRY_S)
                continue
            ids: list[str] = answer["rollout_ids"]
            self._notebook.write(
                "submit", phase="ok", key=key, group_id=answer["group_id"], rollout_ids=ids
            )
            return ids

    def _follow(self, rollout_id: str, body: Record, rng: random.Random) -> None:
        """Until it has ended and its whole answer is written down."""
        disturb = rng.choice((None, None, None, "pause"))
        if body["metadata"]["is_cancelled"]:
            disturb = "cancel"
        at_token = rng.randrange(1, 60)
        is_streamed = rng.random() < 0.75
        while True:
            rollout = self._get(rollout_id, wait_s=0, after=0)
            if rollout["state"] in ("finished", "aborted", "failed"):
                break
            num = len(rollout["output_ids"])
            if rollout["state"] == "paused":
                # by an earlier life of this client, which was killed before it could resume it
                self._control(rollout_id, "resume")
                continue
            if disturb and num >= at_token:
                self._disturb(rollout_id, disturb, rng)
                disturb = None
                continue
            enough = at_token if disturb else sys.maxsize
            try:
                if is_streamed:
                    self._stream(rollout_id, num, enough)
                else:
                    self._get(rollout_id, wait_s=0.3, after=num)
            except Unanswered:
                time.sleep(RETRY_S)

    def _get(self, rollout_id: str, *, wait_s: float, after: int) -> Record:
        """The rollout now, or once it has more than `after` tokens; tried until answered."""
        while True:
            asked = time.monotonic_ns()
            query = f"?wait={wait_s}&after={after}" if wait_s else ""
            try:
                rollout: Record = self._api.call("GET", f"/rollouts/{rollout_id}{query}")
            except Unanswered:
                time.sleep(RETRY_S)
                continue
            except Refused as error:
                self._notebook.write("gone", id=rollout_id, asked=asked, error=str(error))
                raise
            if rollout["state"] in ("finished", "aborted", "failed"):
                self._notebook.write("whole", id=rollout_id, asked=asked, rollout=rollout)
            ids = rollout["output_ids"]
            self._notebook.write(
                "saw",
                id=rollout_id,
                asked=asked,
                after=0,
                ids=ids,
                lp=rollout["lp_sampled"],
                num=len(ids),
                state=rollout["state"],
            )
            return rollout

    def _stream(self, rollout_id: str, after: int, enough: int) -> None:
        with self._lock:
            name = f"{rollout_id}/{next(self._names)}"
        self._notebook.write("open", id=rollout_id, stream=name, after=after)
        asked = time.monotonic_ns()
        events = self._api.events(f"/rollouts/{rollout_id}/stream?after={after}")
        try:
            for event in events:
                if "error" in event:
                    raise Unanswered(f"in mid-stream: {event['error']}")
                self._notebook.write(
                    "saw",
                    id=rollout_id,
                    asked=asked,
                    after=event["start"],
                    ids=event["output_ids"],
                    lp=event["lp_sampled"],
                    num=None,
                    state=event["state"],
                )
                if event["end"] >= enough:
                    return
        finally:
            events.close()  # type: ignore[attr-defined]
            self._notebook.write("close", id=rollout_id, stream=name)

    def _disturb(self, rollout_id: str, what: str, rng: random.Random) -> None:
        self._control(rollout_id, what)
        if what == "pause":
            # long enough that some are killed while they are paused
            time.sleep(rng.choice((0.0, 0.1, 1.0)))
            self._get(rollout_id, wait_s=0, after=0)
            self._control(rollout_id, "resume")

    def _control(self, rollout_id: str, what: str) -> None:
        while True:
            asked = time.monotonic_ns()
            try:
                self._api.call("POST", f"/rollouts/{rollout_id}/{what}", {})
            except Unanswered:
                time.sleep(RETRY_S)
            except Refused as error:
                if error.status != 409:
                    raise
                return  # it has ended meanwhile
            else:
                self._notebook.write("control", id=rollout_id, asked=asked, call=what)
                return

    def _acknowledge(self, ids: list[str]) -> None:
        while True:
            self._notebook.write("ack", phase="invoke", ids=ids, sync=True)
            try:
                self._api.call("POST", "/rollouts/ack", {"ids": ids})
            except Unanswered:
                self._notebook.write("ack", phase="unknown", ids=ids)
                time.sleep(RETRY_S)
            else:
                self._notebook.write("ack", phase="ok", ids=ids)
                return

    def _is_gone(self, rollout_id: str) -> None:
        asked = time.monotonic_ns()
        try:
            rollout = self._api.call("GET", f"/rollouts/{rollout_id}")
        except (Unanswered, Refused):
            return
        self._notebook.write("whole", id=rollout_id, asked=asked, rollout=rollout)

    def _list(self, *, is_last: bool = False) -> bool:
        """Write down what waits for its reader; True where it could not be asked."""
        asked, found = time.monotonic_ns(), []
        cursor = ""
        try:
            while True:
                page = self._api.call("GET", f"/rollouts?limit=500{cursor}")
                found += [item for item in page["data"] if not item["is_acked"]]
                if page["next_cursor"] is None:
                    break
                cursor = f"&cursor={urllib.parse.quote(page['next_cursor'])}"
        except Unanswered:
            return True
        ids = [i["id"] for i in found if is_last or i["state"] in ("finished", "aborted", "failed")]
        self._notebook.write("listed", asked=asked, ids=ids, is_last=is_last)
        return False


Unfinished = tuple[str, Record, list[str]]


def unfinished(history: Path) -> list[Unfinished]:
    """What a history has submitted and not acknowledged: (key, body, ids).

    ids  whose acknowledgement was sent, and may have been taken; [] if none was
    """
    bodies: dict[str, Record] = {}
    answers: dict[str, list[str]] = {}
    acking: set[str] = set()
    acked: set[str] = set()
    for record in read_records(history):
        match record["kind"], record.get("phase"):
            case "submit", "invoke":
                bodies[record["key"]] = record["body"]
            case "submit", "ok":
                answers[record["key"]] = record["rollout_ids"]
            case "ack", "invoke":
                acking |= set(record["ids"])
            case "ack", "ok":
                acked |= set(record["ids"])
    return [
        (key, body, [i for i in answers.get(key, []) if i in acking])
        for key, body in bodies.items()
        if not acked.issuperset(answers.get(key, [key]))
    ]


class Twins:
    """The rollouts of another history again, one by one, with the seeds that they had."""

    def __init__(self, api: Api, notebook: Notebook, given: argparse.Namespace) -> None:
        self._api, self._notebook, self._given = api, notebook, given

    def run(self) -> None:
        bodies, answers, rollouts = {}, {}, {}
        for record in read_records(self._given.twins):
            if record["kind"] == "submit" and record["phase"] == "invoke":
                bodies[record["key"]] = record["body"]
            elif record["kind"] == "submit" and record["phase"] == "ok":
                answers |= dict.fromkeys(record["rollout_ids"], record["key"])
            elif record["kind"] == "whole":
                rollouts[record["id"]] = record["rollout"]
        with ThreadPoolExecutor(self._given.groups * self._given.samples) as pool:
            running = [
                pool.submit(self._again, rollout, bodies[answers[rollout_id]])
                for rollout_id, rollout in rollouts.items()
                if rollout_id in answers
            ]
            for done in running:
                done.result()
        self._notebook.write("done", sync=True)

    def _again(self, rollout: Record, body: Record) -> None:
        sampling = body["sampling"] | {"seed": rollout["seed"]}
        body = body | {"samples": 1, "sampling": sampling}
        answer = self._api.call("POST", "/rollouts", body, key=f"twin-{rollout['id']}")
        [twin_id] = answer["rollout_ids"]
        twin: Record = {"state": "queued"}
        while twin["state"] not in ("finished", "aborted", "failed"):
            twin = self._api.call("GET", f"/rollouts/{twin_id}?wait=10&after=1000000")
        self._notebook.write("whole", id=twin_id, of=rollout["id"], rollout=twin)
        self._api.call("POST", "/rollouts/ack", {"ids": [twin_id]})


def main() -> int:
    parser = argparse.ArgumentParser(description="load and witness of the crash harness")
    parser.add_argument("--url", required=True)
    parser.add_argument("--history", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", type=int, default=6, help="groups at once")
    parser.add_argument("--samples", type=int, default=4, help="at most, per group")
    parser.add_argument("--tokens", type=int, default=300, help="at most, per rollout")
    parser.add_argument("--stop-file", type=Path, help="once it exists nothing more is submitted")
    parser.add_argument("--twins", type=Path)
    given = parser.parse_args()
    kind = Twins if given.twins else Load
    kind(Api(given.url), Notebook(given.history), given).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
