"""Double entry: what can be posted, and what the balance says when it is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.engine.errors import LedgerError
from everstep.trainer_bridge.c3po.ledger import LEGAL, Account, Ledger, LedgerState

postings = st.lists(
    st.tuples(st.integers(-1, 9), st.sampled_from(list(Account)), st.sampled_from(list(Account)))
)


@given(postings)
def test_whatever_is_posted_the_books_balance_and_no_account_is_overdrawn(postings):
    ledger = Ledger()
    expected = dict.fromkeys(Account, 0)
    for count, source, target in postings:
        has_it = source is Account.SAMPLED or expected[source] >= count
        if target in LEGAL[source] and count >= 0 and has_it:
            ledger.post(count, source, target)
            expected[source] += count if source is Account.SAMPLED else -count
            expected[target] += count
        else:
            with pytest.raises(LedgerError):
                ledger.post(count, source, target)
        assert {account: ledger[account] for account in Account} == expected
        ledger.balance(3, carried=expected[Account.CARRIED], held=expected[Account.HELD])
        ledger.row(3).check()
    assert Ledger(ledger.snapshot()).row(3) == ledger.row(3)


def test_a_row_holds_one_iteration_and_opens_with_what_the_last_one_left():
    ledger = Ledger()
    ledger.post(10, Account.SAMPLED, Account.CARRIED)
    ledger.post(4, Account.CARRIED, Account.HELD)
    ledger.post(1, Account.HELD, Account.DELIVERED)
    first = ledger.close(0)
    assert (first.sampled, first.carried, first.held, first.delivered) == (10, 6, 3, 1)
    ledger.post(6, Account.CARRIED, Account.PURGED)
    second = ledger.close(1)
    assert (second.opening_carried, second.opening_held, second.sampled) == (6, 3, 0)
    assert (second.purged, second.carried, second.held, second.wasted) == (6, 0, 3, 6)
    assert ledger.total(1).sampled == 10


@pytest.mark.parametrize(
    ("counts", "account"),
    [({"carried": 4, "held": 1}, "carried"), ({"carried": 5, "held": 0}, "held")],
)
def test_an_imbalance_names_account_and_iteration(counts, account):
    ledger = Ledger()
    ledger.post(6, Account.SAMPLED, Account.CARRIED)
    ledger.post(1, Account.CARRIED, Account.HELD)
    with pytest.raises(LedgerError, match=f"iteration 7: account {account} says"):
        ledger.balance(7, **counts)


def test_a_forged_state_does_not_balance():
    state = LedgerState(balances={"sampled": -5, "delivered": 6}, opening={})
    with pytest.raises(LedgerError, match=r"iteration 2: account sampled differs .* by 1 tokens"):
        Ledger(state).balance(2, carried=0, held=0)
    state = LedgerState(balances={"purged": -1, "delivered": 1}, opening={})
    with pytest.raises(LedgerError, match="account purged is overdrawn by 1 tokens"):
        Ledger(state).balance(2, carried=0, held=0)
