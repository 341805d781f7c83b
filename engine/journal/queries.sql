-- name: put-books
INSERT OR REPLACE INTO books VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)

-- name: books
SELECT uid, num_commits, is_all_paused, flip_version, flip_digest, num_accepted, next_rollout,
       next_row, next_origin, next_key, tables, sum
FROM books

-- name: put-rollout
INSERT OR REPLACE INTO rollouts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)

-- name: mark-rollout
UPDATE rollouts SET state = ?, sum = ? WHERE number = ?

-- name: drop-rollout
DELETE FROM rollouts WHERE number = ?

-- name: rollouts
SELECT number, id, group_id, sample, pool, state, created_s, ended_s, num_tokens, acked_s, digest,
       sum
FROM rollouts ORDER BY number

-- name: trajectory
SELECT trajectory FROM rollouts WHERE number = ?

-- name: add-tokens
INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)

-- name: tokens
SELECT row, origin, numbers, counts, ids, lp_sampled, lp_temp, kept_mass, flags, rest, sum
FROM tokens WHERE row >= ? AND row < ? ORDER BY row

-- name: drop-tokens
DELETE FROM tokens WHERE row >= ? AND row < ? RETURNING length(ids), sum

-- name: add-origin
INSERT INTO origins VALUES (?, ?, ?, ?, ?, ?, ?)

-- name: origins
SELECT number, version, digest, numerics, core, kv, sum FROM origins ORDER BY number

-- name: drop-origin
DELETE FROM origins WHERE number = ?

-- name: add-key
INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?)

-- name: keys
SELECT number, holder, route, key, body_digest, created_s, rollout_ids, sum
FROM keys ORDER BY number

-- name: drop-key
DELETE FROM keys WHERE number = ?

-- name: put-budget
INSERT OR REPLACE INTO budgets
(number, id, pool, tokens, used, state, created_s, ended_s, places, sum)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)

-- name: budgets
SELECT number, id, pool, tokens, used, state, created_s, ended_s, places, sum
FROM budgets ORDER BY number

-- name: budgets-without-places
SELECT number, id, pool, tokens, used, state, created_s, ended_s, sum FROM budgets ORDER BY number

-- name: drop-budget
DELETE FROM budgets WHERE number = ?

-- name: add-flip
INSERT INTO flips VALUES (?, ?, ?, ?, ?, ?, ?, ?)

-- name: flips
SELECT number, version, digest, folder, parent, lineage, base, sum FROM flips ORDER BY number
