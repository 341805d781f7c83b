"""The books of a C3PO++ run: every sampled token is in exactly one account.

    sampled ──▶ carried ──▶ held ──▶ delivered
                  │          │
                  ├──────────┼──▶ purged        too old: by σ, or by max_lag
                  ├──────────┼──▶ cancelled     somebody cancelled it, or its group was abandoned
                  └──────────┴──▶ regenerated   lost, or failed: the sample is drawn again

Double entry: a posting takes from one account what it gives another, and `sampled` holds the
negative of all others. So the sum is always zero; `balance` compares the two accounts that have
an owner (carried: the pool, held: the hold area) with what the owner counts.
"""

from enum import StrEnum

from msgspec import Struct

from ...engine.errors import LedgerError


class Account(StrEnum):
    """Where tokens are."""

    SAMPLED = "sampled"
    """The counter-account: minus everything that was ever sampled."""
    CARRIED = "carried"
    HELD = "held"
    DELIVERED = "delivered"
    PURGED = "purged"
    REGENERATED = "regenerated"
    CANCELLED = "cancelled"


# the one table of legal postings; what is delivered or wasted never moves again
LEGAL: dict[Account, frozenset[Account]] = {
    # tokens that arrive for a rollout that was given up meanwhile were sampled all the same
    Account.SAMPLED: frozenset({Account.CARRIED, Account.PURGED, Account.CANCELLED}),
    Account.CARRIED: frozenset(
        {Account.HELD, Account.PURGED, Account.REGENERATED, Account.CANCELLED}
    ),
    Account.HELD: frozenset(
        {Account.DELIVERED, Account.PURGED, Account.REGENERATED, Account.CANCELLED}
    ),
    Account.DELIVERED: frozenset(),
    Account.PURGED: frozenset(),
    Account.REGENERATED: frozenset(),
    Account.CANCELLED: frozenset(),
}


class Books(Struct, kw_only=True, frozen=True):
    """One iteration, in tokens: what was sampled in it, where tokens went in it, what is left.

    opening_carried + opening_held + sampled
        = carried + held + delivered + purged + regenerated + cancelled
    """

    iteration: int
    opening_carried: int = 0
    opening_held: int = 0
    sampled: int = 0
    delivered: int = 0
    purged: int = 0
    regenerated: int = 0
    cancelled: int = 0
    carried: int = 0
    held: int = 0

    @property
    def wasted(self) -> int:
        return self.purged + self.regenerated + self.cancelled

    def check(self) -> None:
        """Raise LedgerError, naming the iteration, unless the equation above holds."""
        given = self.opening_carried + self.opening_held + self.sampled
        found = self.carried + self.held + self.delivered + self.wasted
        if given != found:
            raise LedgerError(
                f"books of iteration {self.iteration}: {given} tokens came in and "
                f"{found} are accounted for"
            )


class LedgerState(Struct, kw_only=True):
    """A ledger at rest: balances now, and at the last closing."""

    balances: dict[str, int]
    opening: dict[str, int]


class Ledger:
    """Balances since the run began, and since the iteration began."""

    def __init__(self, state: LedgerState | None = None) -> None:
        self._balances = dict.fromkeys(Account, 0)
        self._opening = dict.fromkeys(Account, 0)
        if state is not None:
            self._balances.update({Account(k): v for k, v in state.balances.items()})
            self._opening.update({Account(k): v for k, v in state.opening.items()})

    def __getitem__(self, account: Account) -> int:
        """Tokens in it, over the whole run; of SAMPLED, how many there ever were."""
        balance = self._balances[account]
        return -balance if account is Account.SAMPLED else balance

    def post(self, count: int, source: Account, target: Account) -> None:
        """Move `count` tokens. Raises LedgerError, with nothing changed, if the posting is not
        legal or there are fewer in `source`."""
        if target not in LEGAL[source]:
            raise LedgerError(f"ledger: no token moves from {source} to {target}")
        if count < 0:
            raise LedgerError(f"ledger: {count} tokens from {source} to {target}: less than none")
        if source is not Account.SAMPLED and count > self._balances[source]:
            raise LedgerError(
                f"ledger: {count} tokens from {source} to {target}, "
                f"but {source} holds {self._balances[source]}"
            )
        self._balances[source] -= count
        self._balances[target] += count

    def balance(self, iteration: int, *, carried: int, held: int) -> None:
        """Raise LedgerError, naming account and iteration, unless the books are right.

        `carried` and `held` are the owners' own counts, made without the ledger.
        """
        for account, counted in ((Account.CARRIED, carried), (Account.HELD, held)):
            if self._balances[account] != counted:
                raise LedgerError(
                    f"ledger, iteration {iteration}: account {account} says "
                    f"{self._balances[account]} tokens, counted are {counted}"
                )
        for account in Account:
            if account is not Account.SAMPLED and self._balances[account] < 0:
                raise LedgerError(
                    f"ledger, iteration {iteration}: account {account} is overdrawn by "
                    f"{-self._balances[account]} tokens"
                )
        rest = sum(self._balances.values())
        if rest:
            raise LedgerError(
                f"ledger, iteration {iteration}: account {Account.SAMPLED} differs from "
                f"the sum of all others by {rest} tokens"
            )

    def row(self, iteration: int) -> Books:
        """The books of the iteration so far."""
        flow = {account: self[account] - self._at_opening(account) for account in Account}
        return Books(
            iteration=iteration,
            opening_carried=self._opening[Account.CARRIED],
            opening_held=self._opening[Account.HELD],
            sampled=flow[Account.SAMPLED],
            delivered=flow[Account.DELIVERED],
            purged=flow[Account.PURGED],
            regenerated=flow[Account.REGENERATED],
            cancelled=flow[Account.CANCELLED],
            carried=self[Account.CARRIED],
            held=self[Account.HELD],
        )

    def total(self, iteration: int) -> Books:
        """The whole run as one row."""
        return Books(
            iteration=iteration,
            **{account.value: self[account] for account in Account},
        )

    def close(self, iteration: int) -> Books:
        """The iteration's books; the next one begins. Raises LedgerError as `Books.check`."""
        row = self.row(iteration)
        row.check()
        self._opening = dict(self._balances)
        return row

    def snapshot(self) -> LedgerState:
        return LedgerState(
            balances={account.value: count for account, count in self._balances.items()},
            opening={account.value: count for account, count in self._opening.items()},
        )

    def _at_opening(self, account: Account) -> int:
        balance = self._opening[account]
        return -balance if account is Account.SAMPLED else balance
