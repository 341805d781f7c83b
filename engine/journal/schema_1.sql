-- Every row carries `sum`, a checksum of all its other columns (of a blob that is read by itself:
-- of its digest). `books` counts the rows of each table and adds up their sums, so that a missing,
-- a stale and a surplus row are found too. There is no index: names are looked up in memory.

CREATE TABLE books (
    id INTEGER PRIMARY KEY,            -- 1
    uid TEXT NOT NULL,                 -- of this journal, drawn when it was made
    num_commits INTEGER NOT NULL,
    is_all_paused INTEGER NOT NULL,
    flip_version INTEGER,
    flip_digest TEXT,
    num_accepted INTEGER NOT NULL,     -- largest number of a submission
    next_rollout INTEGER NOT NULL,     -- numbers are never given twice
    next_row INTEGER NOT NULL,
    next_origin INTEGER NOT NULL,
    next_key INTEGER NOT NULL,
    tables BLOB NOT NULL,              -- msgpack: table -> [rows, sum of their sums]
    sum INTEGER NOT NULL
) STRICT;

CREATE TABLE rollouts (
    number INTEGER PRIMARY KEY,        -- order of acceptance
    id TEXT NOT NULL,
    group_id TEXT NOT NULL,
    sample INTEGER NOT NULL,
    pool TEXT NOT NULL,
    state TEXT NOT NULL,
    created_s REAL NOT NULL,
    ended_s REAL,
    num_tokens INTEGER NOT NULL,       -- in `trajectory`; a live rollout has more in `tokens`
    acked_s REAL,
    digest INTEGER NOT NULL,           -- checksum of `trajectory`
    sum INTEGER NOT NULL,
    trajectory BLOB NOT NULL           -- msgpack Trajectory; empty once acknowledged
) STRICT;

-- the new tokens of all rollouts in one commit, of one origin
CREATE TABLE tokens (
    row INTEGER PRIMARY KEY,
    origin INTEGER NOT NULL,
    numbers BLOB NOT NULL,             -- int32, rollouts
    counts BLOB NOT NULL,              -- int32, tokens of each; empty: one
    ids BLOB NOT NULL,                 -- int32, end to end
    lp_sampled BLOB NOT NULL,          -- float32
    lp_temp BLOB NOT NULL,             -- float32; empty: as lp_sampled
    kept_mass BLOB NOT NULL,           -- float32; empty: 1
    flags BLOB NOT NULL,               -- uint8; empty: 1, sampled
    rest BLOB NOT NULL,                -- msgpack, of those that have more; empty: none
    sum INTEGER NOT NULL
) STRICT;

-- under what tokens were made
CREATE TABLE origins (
    number INTEGER PRIMARY KEY,
    version INTEGER NOT NULL,
    digest TEXT NOT NULL,
    numerics TEXT NOT NULL,
    core TEXT NOT NULL,
    kv TEXT NOT NULL,
    sum INTEGER NOT NULL
) STRICT;

-- Idempotency-Keys and what they were answered with
CREATE TABLE keys (
    number INTEGER PRIMARY KEY,
    holder TEXT NOT NULL,
    route TEXT NOT NULL,
    key TEXT NOT NULL,
    body_digest TEXT NOT NULL,
    created_s REAL NOT NULL,
    rollout_ids BLOB NOT NULL,         -- msgpack
    sum INTEGER NOT NULL
) STRICT;
