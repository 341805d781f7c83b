"""Bugs that only this folder sows: patches of the code under test, each with what it does.

No switch in shipped code. A bug is a function that is given pytest's MonkeyPatch.
"""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from everstep.engine.core.kv_cache import KVCacheManager
from everstep.engine.core.roster import Roster
from everstep.engine.errors import JournalFull
from everstep.engine.journal.ops import Ack
from everstep.engine.journal.thread import JournalThread
from everstep.engine.manager import keeping, manager
from everstep.engine.manager.budgets import Budgets, Lease
from everstep.engine.manager.collector import Collector
from everstep.engine.manager.keeping import Keeper
from everstep.engine.manager.request_keys import RequestKeys
from everstep.engine.manager.versions import Versions
from everstep.engine.messages import Resume
from everstep.trainer_bridge.c3po.ledger import Account, Ledger
from everstep.trainer_bridge.c3po.samples import Samples

Bug = Callable[[pytest.MonkeyPatch], None]


def ack_before_commit(patch: pytest.MonkeyPatch) -> None:
    """A submission is answered before it is in the journal."""

    async def at_once(self, future):
        future.add_done_callback(lambda done: done.cancelled() or done.exception())

    patch.setattr(Keeper, "_durable", at_once)


def publish_before_commit(patch: pytest.MonkeyPatch) -> None:
    """Tokens are shown before they are in the journal."""
    then = Keeper._then

    def early(self, future, call):
        call()
        then(self, future, lambda: None)

    patch.setattr(Keeper, "_then", early)


def sibling_lost(patch: pytest.MonkeyPatch) -> None:
    """Recovery brings back only the first sample of a group."""
    real = manager.bring_back

    def careless(recovered, *args, **options):
        live = [rollout for rollout in recovered.live if rollout.index == 0]
        return real(replace(recovered, live=live), *args, **options)

    patch.setattr(manager, "bring_back", careless)


def version_stamp_dropped(patch: pytest.MonkeyPatch) -> None:
    """Tokens carry the version of the first weights that a front has seen."""
    origins_of = Collector._origins_of

    def first(self, message):
        found = getattr(self, "first_origins", None) or origins_of(self, message)
        self.first_origins = found
        return found

    patch.setattr(Collector, "_origins_of", first)


def acknowledged_in_vain(patch: pytest.MonkeyPatch) -> None:
    """Acknowledgements are answered and not written: all is delivered again."""
    commit = Keeper.commit

    async def forgetful(self, op):
        if not isinstance(op, Ack):
            await commit(self, op)

    patch.setattr(Keeper, "commit", forgetful)


def tail_lost(patch: pytest.MonkeyPatch) -> None:
    """A core that is told of a rollout again does not get its last token."""
    add = Collector._add

    def short(self, growth):
        message = add(self, growth)
        message.output_ids = message.output_ids[:-1]
        return message

    patch.setattr(Collector, "_add", short)


def seed_changed(patch: pytest.MonkeyPatch) -> None:
    """A rollout that goes on at another core draws other noise."""
    add = Collector._add

    def shifted(self, growth):
        message = add(self, growth)
        message.seed += bool(message.output_ids)
        return message

    patch.setattr(Collector, "_add", shifted)


def counter_reset(patch: pytest.MonkeyPatch) -> None:
    """Derived seeds begin anew after a restart."""
    recover = Keeper.recover

    async def forgetful(self):
        recovered = await recover(self)
        self._number = 0
        return recovered

    patch.setattr(keeping.Keeper, "recover", forgetful)


def key_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Idempotency-Keys do not survive a restart."""
    patch.setattr(RequestKeys, "restore", lambda self, keys: None)


def stale_prefix(patch: pytest.MonkeyPatch) -> None:
    """Blocks of old weights are still found by those who run under new ones."""
    patch.setattr(KVCacheManager, "set_version", lambda self, digest: None)


def full_disk_ignored(patch: pytest.MonkeyPatch) -> None:
    """A commit that found the disk full counts as done."""
    real = JournalThread._try

    def blind(self, batch):
        error = real(self, batch)
        return None if isinstance(error, JournalFull) else error

    patch.setattr(JournalThread, "_try", blind)


def budget_plus_one(patch: pytest.MonkeyPatch) -> None:
    """A pool may draw one token more than its budget has."""
    limit = Lease.limit.fget

    def more(self):
        found = limit(self)
        return found + 1 if found is not None and self.budget is not None else found

    def take(self, pool, num_tokens):
        lease = self._leases.get(pool)
        if lease is not None and lease.budget is not None:
            lease.taken += num_tokens

    patch.setattr(Lease, "limit", property(more))
    patch.setattr(Budgets, "take", take)


def budget_refilled(patch: pytest.MonkeyPatch) -> None:
    """After a restart an open budget has all of its tokens again."""
    restore = Budgets.restore

    def refill(self, budgets):
        restore(self, [replace(budget, used=0) for budget in budgets])

    patch.setattr(Budgets, "restore", refill)


def meter_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A core that is started again is not told of budgets."""
    patch.setattr(Budgets, "meters", lambda self: [])


def pool_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A core is not told to which pool a rollout belongs that comes with tokens."""
    add = Collector._add

    def without(self, growth):
        message = add(self, growth)
        if message.output_ids:
            message.pool = ""
        return message

    patch.setattr(Collector, "_add", without)


def purge_not_counted(patch: pytest.MonkeyPatch) -> None:
    """What is purged leaves the books without a posting, and nobody compares them."""
    post = Ledger.post

    def careless(self, count, source, target):
        if target is not Account.PURGED:
            post(self, count, source, target)

    patch.setattr(Ledger, "post", careless)
    patch.setattr(Ledger, "balance", lambda self, iteration, **counted: None)


def never_too_old(patch: pytest.MonkeyPatch) -> None:
    """Rollouts are carried on however often they were cut."""
    patch.setattr(Samples, "purge_by_age", lambda self, retention: [])


def member_dropped(patch: pytest.MonkeyPatch) -> None:
    """A group goes to the trainer without its last member."""
    train_group = Samples._train_group

    def short(self, prompt):
        group = train_group(self, prompt)
        return replace(group, samples=group.samples[:-1] or group.samples)

    patch.setattr(Samples, "_train_group", short)


def kept_kv_untold(patch: pytest.MonkeyPatch) -> None:
    """Segments do not say that their tokens were drawn over KV of older weights."""
    patch.setattr(Roster, "note_kv", lambda self, rollout, kv: None)


def flip_not_journaled(patch: pytest.MonkeyPatch) -> None:
    """A front that is started again serves the weights that it was made with."""
    patch.setattr(Versions, "restore", lambda self, flips: None)


def resumed_too_early(patch: pytest.MonkeyPatch) -> None:
    """Who waits for weights is resumed, and paused again at once (this one was ours)."""

    def resume(self, growths):
        self.tell(Resume([growth.rollout.id for growth in growths]))
        self.hold()

    patch.setattr(Collector, "resume", resume)


BUGS: dict[str, Bug] = {
    bug.__name__: bug
    for bug in (
        ack_before_commit,
        publish_before_commit,
        sibling_lost,
        version_stamp_dropped,
        acknowledged_in_vain,
        tail_lost,
        seed_changed,
        counter_reset,
        key_forgotten,
        stale_prefix,
        full_disk_ignored,
        budget_plus_one,
        budget_refilled,
        meter_forgotten,
        pool_forgotten,
        purge_not_counted,
        never_too_old,
        member_dropped,
        kept_kv_untold,
        flip_not_journaled,
        resumed_too_early,
    )
}
