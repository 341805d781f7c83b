"""The waiting queue: who is next, whatever left it and came back."""

import random

from everstep.engine.core.admission import LiveRollout, Shares, WaitingQueue
from everstep.engine.core.kv_cache import RolloutKV
from everstep.engine.messages import Add
from everstep.engine.rollout import SamplingParams


def make_rollout(arrival: int, *, priority: int = 0, client: str = "") -> LiveRollout:
    add = Add(
        rollout_id=f"r{arrival}",
        prompt_ids=[1],
        sampling=SamplingParams(),
        seed=0,
        max_tokens=1,
        priority=priority,
        client=client,
    )
    return LiveRollout(add, [1], RolloutKV([1]), arrival)


def drain(queue: WaitingQueue) -> list[LiveRollout]:
    found = []
    while (rollout := queue.best()) is not None:
        queue.remove(rollout)
        found.append(rollout)
    return found


def test_priority_comes_before_arrival():
    queue = WaitingQueue()
    rollouts = [make_rollout(1), make_rollout(2, priority=1), make_rollout(3)]
    for rollout in rollouts:
        queue.push(rollout)
    assert drain(queue) == [rollouts[1], rollouts[0], rollouts[2]]


def test_who_comes_back_has_the_place_of_its_arrival():
    queue = WaitingQueue()
    rollouts = [make_rollout(arrival) for arrival in range(4)]
    for rollout in rollouts:
        queue.push(rollout)
    first = queue.best()
    queue.remove(first)
    assert queue.best() is rollouts[1]
    queue.remove(rollouts[2])
    queue.push(first)
    queue.push(rollouts[2])
    assert drain(queue) == rollouts


def test_queue_agrees_with_a_sorted_list_and_keeps_no_more_than_it_must():
    rng = random.Random(1)
    queue, shares = WaitingQueue(), Shares()
    rollouts = [
        make_rollout(arrival, priority=rng.randint(0, 1), client=rng.choice("ab"))
        for arrival in range(300)
    ]
    for rollout in rollouts:
        shares.activate(rollout)
    waiting: set[LiveRollout] = set()
    for act in range(6000):
        rollout = rng.choice(rollouts)
        if rollout in waiting:
            queue.remove(rollout)
            waiting.remove(rollout)
        elif act < 3000 or rng.random() < 0.2:
            queue.push(rollout)
            waiting.add(rollout)
        if act % 7 == 0:
            rollout.share.served_tokens += 1
            expected = min(
                waiting,
                key=lambda r: (-r.add.priority, r.share.served_tokens, r.arrival),
                default=None,
            )
            assert queue.best() is expected
        assert len(queue) == len(waiting)
        num_records = sum(rollout.has_record for rollout in rollouts)
        assert num_records <= 2 * len(waiting) + 65
    assert set(drain(queue)) == waiting


def test_client_that_becomes_active_is_lifted_to_the_least_served():
    shares = Shares()
    first, second, third = (make_rollout(i, client=c) for i, c in enumerate("abc"))
    shares.activate(first)
    shares.activate(second)
    first.share.served_tokens, second.share.served_tokens = 100, 40
    shares.activate(third)
    assert third.share.served_tokens == 40


def test_client_that_leaves_and_returns_keeps_what_it_was_served():
    shares = Shares()
    first, second = make_rollout(0, client="a"), make_rollout(1, client="b")
    shares.activate(first)
    shares.activate(second)
    first.share.served_tokens, second.share.served_tokens = 100, 40
    shares.deactivate(first)
    shares.activate(first)
    assert first.share.served_tokens == 100


def test_clients_that_left_are_forgotten_once_they_would_be_lifted_anyway():
    shares = Shares()
    stays = make_rollout(0, client="stays")
    shares.activate(stays)
    for arrival in range(1, 50):
        guest = make_rollout(arrival, client=f"guest {arrival}")
        shares.activate(guest)
        guest.share.served_tokens += 10
        stays.share.served_tokens += 10
        shares.deactivate(guest)
    assert shares.num_clients <= 2
