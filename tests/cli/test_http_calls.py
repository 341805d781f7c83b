"""What many tasks ask a server for at once is one request; nobody waits for another's answer."""

import asyncio
from collections.abc import Sequence

import pytest

from everstep.engine.errors import EngineUnavailable, InvalidRequest, UnknownRollout
from everstep.engine.rollout import Found, Rollout, SamplingParams
from everstep.rollout.http_calls import MOST, MOST_FOLLOWED, WIDTH, Endings, Together
from tests.trainer_bridge.rollout_world import run


class Server:
    """Requests as they come; each is answered when it is let."""

    def __init__(self) -> None:
        self.requests: list[list[int]] = []
        self.gates: list[asyncio.Event] = []
        self.error: Exception | None = None

    async def send(self, numbers: Sequence[int]) -> list[int | Exception]:
        gate = asyncio.Event()
        self.requests.append(list(numbers))
        self.gates.append(gate)
        await gate.wait()
        if self.error is not None:
            raise self.error
        return [-n if n else InvalidRequest("nought") for n in numbers]


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_who_asks_while_requests_are_under_way_is_in_the_next():
    async def story() -> None:
        server = Server()
        together = Together(server.send)
        tasks = [asyncio.create_task(together(number)) for number in (1, 2, 3)]
        await turns()
        assert server.requests == [[1, 2, 3]]
        for number in range(4, 4 + WIDTH + 2):
            tasks.append(asyncio.create_task(together(number)))
            await turns()
        # no more than WIDTH of them; whoever is late waits
        assert len(server.requests) == WIDTH
        tasks[-1].cancel()
        for at in range(WIDTH + 1):
            server.gates[at].set()
            await turns()
        assert [await task for task in tasks[:-1]] == [-n for n in range(1, 4 + WIDTH + 1)]
        # who left asked for nothing
        asked = [number for request in server.requests for number in request]
        assert sorted(asked) == [*range(1, 4 + WIDTH + 1)]

    run(story())


def test_an_error_of_one_is_not_anothers_and_an_error_of_all_is_everybodys():
    async def story() -> None:
        server = Server()
        together = Together(server.send)
        tasks = [asyncio.create_task(together(number)) for number in (1, 0)]
        await turns()
        server.gates[0].set()
        assert await tasks[0] == -1
        with pytest.raises(InvalidRequest):
            await tasks[1]
        server.error = EngineUnavailable("gone")
        tasks = [asyncio.create_task(together(number)) for number in (2, 3)]
        await turns()
        server.gates[1].set()
        for task in tasks:
            with pytest.raises(EngineUnavailable):
                await task
        server.error = None
        task = asyncio.create_task(together(4))
        await turns()
        server.gates[2].set()
        assert await task == -4

    run(story())


def test_a_request_has_an_end():
    async def story() -> None:
        server = Server()
        together = Together(server.send)
        tasks = [asyncio.create_task(together(number)) for number in range(1, 2 * MOST)]
        await turns()
        for at in range(2):
            await turns()
            server.gates[at].set()
        await asyncio.gather(*tasks)
        assert sorted(map(len, server.requests)) == [MOST - 1, MOST]

    run(story())


def ended(name: str) -> Rollout:
    return Rollout(
        id=name,
        group_id="g",
        index=0,
        prompt_ids=[1],
        sampling=SamplingParams(),
        seed=1,
        max_tokens=1,
    )


class Rollouts:
    """Ends of rollouts, as a server tells them to who waits."""

    def __init__(self) -> None:
        self.ended: set[str] = set()
        self.unknown: set[str] = set()
        self.requests: list[list[str]] = []
        self.num_open = self.most_open = 0
        self.news = asyncio.Event()
        self.error: Exception | None = None

    def end(self, *names: str) -> None:
        self.ended.update(names)
        self.news.set()
        self.news = asyncio.Event()

    async def wait_any(self, names: Sequence[str]) -> Found:
        self.requests.append(list(names))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            while True:
                if self.error is not None:
                    raise self.error
                found = [ended(name) for name in names if name in self.ended]
                unknown = {name: "never heard of it" for name in names if name in self.unknown}
                if found or unknown:
                    return Found(found, unknown)
                await self.news.wait()
        finally:
            self.num_open -= 1


def test_many_ends_are_waited_for_on_few_requests():
    async def story() -> None:
        server = Rollouts()
        endings = Endings(server.wait_any)
        names = [f"ro-{number}" for number in range(40)]
        tasks = {name: asyncio.create_task(endings(name)) for name in names}
        await asyncio.sleep(1)
        assert server.requests == [names]
        server.end(*names[:30:2])
        await asyncio.sleep(1)
        assert all(tasks[name].done() == (name in server.ended) for name in names)
        # one that comes later is not left waiting for those
        late = asyncio.create_task(endings("ro-late"))
        await asyncio.sleep(1)
        assert server.most_open == 2
        server.end("ro-late", *names)
        assert (await late).id == "ro-late"
        assert {name: (await task).id for name, task in tasks.items()} == dict.fromkeys(names) | {
            name: name for name in names
        }
        assert len(server.requests) == 3
        assert server.num_open == 0

    run(story())


def test_what_requests_leave_is_asked_for_together_again():
    async def story() -> None:
        server = Rollouts()
        endings = Endings(server.wait_any)
        tasks: list[asyncio.Task[Rollout]] = []
        for number in range(4):
            tasks += [asyncio.create_task(endings(f"{number}{suffix}")) for suffix in "ab"]
            await asyncio.sleep(1)
        assert server.num_open == 4
        server.end("0a", "1a", "2a", "3a")
        await asyncio.sleep(1)
        assert server.num_open == 1
        assert server.requests[-1] == ["0b", "1b", "2b", "3b"]
        server.end("0b", "1b", "2b", "3b")
        await asyncio.gather(*tasks)

    run(story())


def test_an_unknown_one_and_trouble_are_told_to_who_waits_for_them():
    async def story() -> None:
        server = Rollouts()
        endings = Endings(server.wait_any)
        gone, there = (asyncio.create_task(endings(name)) for name in ("gone", "there"))
        server.unknown.add("gone")
        with pytest.raises(UnknownRollout, match="never heard"):
            await gone
        server.end("there")
        assert (await there).id == "there"
        server.error = EngineUnavailable("no answer")
        tasks = [asyncio.create_task(endings(name)) for name in ("a", "b")]
        for task in tasks:
            with pytest.raises(EngineUnavailable):
                await task
        server.error = None
        server.end("a")
        assert (await endings("a")).id == "a"

    run(story())


def test_very_many_are_split():
    async def story() -> None:
        server = Rollouts()
        endings = Endings(server.wait_any)
        names = [f"ro-{number}" for number in range(2 * MOST_FOLLOWED + 1)]
        tasks = [asyncio.create_task(endings(name)) for name in names]
        await asyncio.sleep(1)
        assert [len(request) for request in server.requests] == [MOST_FOLLOWED, MOST_FOLLOWED, 1]
        server.end(*names)
        await asyncio.gather(*tasks)

    run(story())
