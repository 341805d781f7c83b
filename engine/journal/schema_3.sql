-- The versions of the weights that served, in order; the last is the one of `books`. A journal of an
-- older schema knows that one only.

CREATE TABLE flips (
    number INTEGER PRIMARY KEY,        -- 1, 2, …
    version INTEGER NOT NULL,
    digest TEXT NOT NULL,
    folder TEXT NOT NULL,              -- where the weights were read from
    parent TEXT NOT NULL,              -- digest; empty: unknown
    lineage TEXT NOT NULL,
    base TEXT NOT NULL,                -- the model that the server was started with
    sum INTEGER NOT NULL
) STRICT;
