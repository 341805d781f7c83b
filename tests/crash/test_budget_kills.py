"""A token budget under real SIGKILLs of server and core: never beyond, at the end to the token."""

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from everstep import Client

HERE = Path(__file__).parent
sys.path.append(str(HERE))

from harness import free_port, make_model, options  # noqa: E402
from victims import Server  # noqa: E402

POOL, TOKENS, NUM_ROLLOUTS, LENGTH = "math", 3600, 8, 600


@contextlib.contextmanager
def served(work: Path) -> Iterator[tuple[Server, Client]]:
    port = free_port()
    arguments = options(make_model(work / "model"), work / "journal.db", port)
    server = Server(work, port, arguments, is_cold=False)
    try:
        server.start([])
        with Client(f"http://127.0.0.1:{port}", retry_s=60.0) as client:
            wait_until_ready(server)
            yield server, client
    finally:
        server.close()


def wait_until_ready(server: Server) -> None:
    until = time.monotonic() + 60
    while not server.look():
        assert server.pid is not None, "it ended by itself; see server.log"
        assert time.monotonic() < until
        time.sleep(0.01)


def strike(server: Server, what: str, faults: Sequence[str] = ()) -> None:
    """kill -9; a server is started again, with these faults."""
    victim = server.core() if what == "core" else server.pid
    if victim is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    if what == "server":
        while server.pid is not None:
            server.look()
            time.sleep(0.001)
        server.start([*faults])
        wait_until_ready(server)


def num_tokens(client: Client, ids: list[str]) -> int:
    return sum(len(client.get(one).output_ids) for one in ids)


@pytest.mark.timeout(300)
def test_a_budget_is_used_to_the_token_whatever_is_killed(tmp_path: Path) -> None:
    rng = random.Random(1)
    with served(tmp_path) as (server, client):
        budget = client.open_budget(POOL, TOKENS, idempotency_key="iteration-1")
        sampling = {"max_tokens": LENGTH, "ignore_eos": True}
        ids = [
            client.submit(prompt_ids=[n, 2, 3], pool=POOL, sampling=sampling).rollout_ids[0]
            for n in range(NUM_ROLLOUTS)
        ]
        [chat] = client.submit(prompt_ids=[9, 9], sampling=sampling).rollout_ids
        used, kills = 0, 0
        while (seen := client.wait_budget(budget.id, timeout_s=0)).state == "open":
            # between two looks at the budget lies the sum of what can be seen of its rollouts
            assert used <= seen.used <= num_tokens(client, ids)
            used = client.wait_budget(budget.id, timeout_s=0).used
            assert used <= TOKENS
            if seen.used > TOKENS * (kills + 1) / 7:
                strike(server, rng.choice(["server", "core"]))
                kills += 1
        assert kills > 1
        assert (seen.state, seen.used) == ("spent", TOKENS)
        assert num_tokens(client, ids) == TOKENS
        assert client.wait(chat, timeout_s=60).finish_reason is not None

        # without one nothing grows, after a kill neither; with another all go on
        strike(server, "server")
        assert num_tokens(client, ids) == TOKENS
        again = client.open_budget(POOL, TOKENS, idempotency_key="iteration-1")
        assert again.id == budget.id
        rest = client.open_budget(POOL, 10**6)
        for one in ids:
            assert len(client.wait(one, timeout_s=60).output_ids) == LENGTH
        closed = client.close_budget(rest.id)
        assert (closed.state, closed.used) == ("closed", NUM_ROLLOUTS * LENGTH - TOKENS)
