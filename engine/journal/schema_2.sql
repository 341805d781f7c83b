-- Token budgets of pools. `used` changes with the tokens that it counts, in one transaction; the
-- newest of a pool stays, so a pool that is metered is known for ever.

CREATE TABLE budgets (
    number INTEGER PRIMARY KEY,        -- order of opening; the largest is never given twice
    id TEXT NOT NULL,
    pool TEXT NOT NULL,
    tokens INTEGER NOT NULL,
    used INTEGER NOT NULL,
    state TEXT NOT NULL,
    created_s REAL NOT NULL,
    ended_s REAL,
    sum INTEGER NOT NULL
) STRICT;
