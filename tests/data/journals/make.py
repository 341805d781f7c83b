"""Make schema-N.db and schema-N.json: a journal as this version writes it, and what it holds.

    python tests/data/journals/make.py        from the root of the checkout

Run once for each released schema and committed; never made again for an old one.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[2]))

from everstep.engine.journal.files import SCHEMA  # noqa: E402
from everstep.engine.journal.journal import Journal  # noqa: E402
from everstep.engine.journal.ops import (  # noqa: E402
    Accept,
    Ack,
    Append,
    Budget,
    CloseBudget,
    End,
    Extra,
    Flip,
    OpenBudget,
    Pause,
    Query,
    RequestKey,
)
from everstep.engine.rollout import SamplingParams  # noqa: E402
from tests.engine.journal.drawn import ORIGINS, end, make_grown, make_rollout  # noqa: E402


def described(journal: Journal) -> dict[str, object]:
    """All that it answers, as JSON."""
    import msgspec

    recovered = journal.recover()
    return msgspec.to_builtins(
        {
            "live": recovered.live,
            "is_all_paused": recovered.is_all_paused,
            "keys": recovered.keys,
            "flip": recovered.flip,
            "num_accepted": recovered.num_accepted,
            "budgets": recovered.budgets,
            "flips": recovered.flips,
            "list": journal.list(Query(limit=1000)),
            "ended": [
                journal.read(s.id) for s in journal.list(Query(limit=1000)) if s.state.is_ended
            ],
        }
    )


def fill(journal: Journal) -> None:
    recording = SamplingParams(record=("lp_raw", "entropy", "kept_ids", "routing"), top_logprobs=2)
    group = [
        make_rollout(f"ro-{index}", index=index, metadata={"q": [1, "é", None]}) for index in (0, 1)
    ]
    key = RequestKey("holder", "/rollouts", "key-1", "digest", created_s=4e9)
    journal.commit([Accept(group, key, 3)])
    journal.commit([Accept([make_rollout("ro-2", sampling=recording, pool="train")])])
    first = Budget(id="bud-1", pool="train", tokens=4, created_s=1_800_000_000.0)
    other = Budget(id="bud-2", pool="eval", tokens=9, created_s=1_800_000_000.0)
    journal.commit([OpenBudget(first), OpenBudget(other), CloseBudget("bud-2")])
    for step in range(6):
        if step == 4:
            second = Budget(
                id="bud-3", pool="train", tokens=100, created_s=1_800_000_004.0, places=2
            )
            key = RequestKey("holder", "/rollouts/budget", "key-2", "digest", created_s=4e9)
            journal.commit([OpenBudget(second, key)])
        news = [make_grown(f"ro-{index}", step, 1) for index in range(3)]
        news[2].extra = Extra(
            lp_raw=[-0.5],
            entropy=[1.25],
            kept_ids=[[1, 2, step]],
            top=[[(7, -0.25), (8, -2.0)]],
            prompt_start=0 if step == 0 else 3,
            prompt_lp=[None, -1.5, -2.5] if step == 0 else [],
            prompt_top=[[], [(1, -1.5)], [(2, -2.5)]] if step == 0 else [],
            routing_ids=bytes([step, step + 1]),
            routing_weights=bytes(8),
        )
        journal.commit([Append(ORIGINS[step // 2], news, 1_800_000_001.0 + step)])
    journal.commit([Flip(2, "bb", "/models/2", "aa", "line-1", "/models/0"), Pause(["ro-0"])])
    whole = end(journal.read("ro-1"))
    whole.text, whole.text_offset = "done", 4
    journal.commit([End(whole), Accept([make_rollout("ro-3", group_id="grp-2")])])
    journal.commit([Accept([end(make_rollout("ro-4"))]), Ack(["ro-4"])])


if __name__ == "__main__":
    path = HERE / f"schema-{SCHEMA}.db"
    path.unlink(missing_ok=True)
    journal = Journal.open(path, clock=lambda: 2e9)
    fill(journal)
    path.with_suffix(".json").write_text(json.dumps(described(journal), indent=1) + "\n")
    journal.close()
    path.with_name(f"{path.name}-lock").unlink()
