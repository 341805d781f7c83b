"""The judge on trial: a faultless history passes, and each way of being wrong is named.

The histories are made here, with tokens that the checker's reference draws; whether that reference
agrees with the engine is `test_the_engine_draws_what_the_reference_draws`.
"""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE))

from checker import check  # noqa: E402
from ring_reference import Ring, Sampling, judge, philox, supports, tempered  # noqa: E402

SAMPLINGS = [
    {"max_tokens": 9, "ignore_eos": True},
    {"max_tokens": 9, "ignore_eos": True, "top_p": 0.8, "repetition_penalty": 1.4, "seed": 77},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from everstep.engine.checkpoint.make_checkpoint import make_checkpoint, resize

    folder = tmp_path_factory.mktemp("crash") / "model"
    return make_checkpoint(
        folder, shape=resize("tiny", ["num_hidden_layers=2"]), format="f32", seed=3
    )


@pytest.fixture(scope="module")
def ring(model) -> Ring:
    return Ring(model)


def draw(ring: Ring, prompt: list[int], sent: dict, seed: int) -> dict:
    sampling = Sampling.of(sent)
    out = {"output_ids": [], "lp_sampled": [], "lp_temp": [], "kept_mass": []}
    for position in range(sampling.max_tokens):
        logits, _ = ring.logits(prompt + out["output_ids"])
        lp = tempered(logits[-1], prompt, out["output_ids"], sampling)
        support = supports(lp, sampling, set())[0]
        mass = float(np.exp(lp[support]).sum())
        cumulative = np.cumsum(np.exp(lp[support]))
        target = philox(seed, position) * cumulative[-1]
        token = int(support[np.searchsorted(cumulative, target, side="right")])
        out["output_ids"].append(token)
        out["lp_temp"].append(float(lp[token]))
        out["lp_sampled"].append(float(lp[token]) - math.log(mass))
        out["kept_mass"].append(mass)
    return out


@pytest.fixture(scope="module")
def good(model, ring) -> tuple[list[dict], list[dict], list[dict]]:
    """(history, kills, unharmed history)"""
    from everstep.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(model)
    history, unharmed, clock = [{"kind": "hello"}], [], iter(range(10, 10**6, 10))
    for number, sent in enumerate(SAMPLINGS):
        body = {
            "prompt_ids": [3 + number, 5, 8],
            "samples": 1 if "seed" in sent else 2,
            "sampling": sent,
            "metadata": {"is_cancelled": False},
        }
        ids = [f"ro-{number}{index}" for index in range(body["samples"])]
        history += [
            {"kind": "submit", "phase": "invoke", "key": f"k{number}", "body": body},
            {"kind": "submit", "phase": "unknown", "key": f"k{number}"},
            {"kind": "submit", "phase": "invoke", "key": f"k{number}", "body": body},
            {
                "kind": "submit",
                "phase": "ok",
                "key": f"k{number}",
                "group_id": f"g{number}",
                "rollout_ids": ids,
            },
        ]
        for index, rollout_id in enumerate(ids):
            seed = sent.get("seed", 1000 + number * 10 + index)
            out = draw(ring, body["prompt_ids"], sent, seed)
            text = tokenizer.decode(out["output_ids"], skip_special_tokens=True)
            count = len(out["output_ids"])
            segment = {"version": 0, "digest": "d", "numerics": "n", "core": "c", "kv": "computed"}
            rollout = {
                **out,
                "group_id": f"g{number}",
                "index": index,
                "state": "finished",
                "finish_reason": {"type": "length"},
                "prompt_ids": body["prompt_ids"],
                "metadata": body["metadata"],
                "flags": [1] * count,
                "versions": [[0, count]],
                "segments": [{"start": 0, **segment}, {"start": 4, **segment, "core": "e"}],
                "usage": {"completion_tokens": count},
                "seed": seed,
                "text": text,
                "text_offset": len(text),
            }
            saw = {"kind": "saw", "id": rollout_id, "state": "running"}
            ids_lps = [rollout["output_ids"], rollout["lp_sampled"]]
            history += [
                {"kind": "open", "id": rollout_id, "stream": rollout_id},
                *(
                    {**saw, "after": a, "ids": ids_lps[0][a:b], "lp": ids_lps[1][a:b], "num": None}
                    for a, b in ((0, 1), (1, 4))
                ),
                {"kind": "close", "id": rollout_id, "stream": rollout_id},
                {**saw, "after": 0, "ids": ids_lps[0][:4], "lp": ids_lps[1][:4], "num": 4},
                {"kind": "whole", "id": rollout_id, "rollout": rollout},
                {"kind": "whole", "id": rollout_id, "rollout": rollout},
            ]
            unharmed.append({"kind": "whole", "id": "twin", "of": rollout_id, "rollout": rollout})
        history += [
            {"kind": "ack", "phase": phase, "ids": ids}
            for phase in ("invoke", "unknown", "invoke", "ok")
        ]
    history += [{"kind": "listed", "ids": [], "is_last": True}, {"kind": "done"}]
    for record in history:
        record["at"] = next(clock)
        if record["kind"] in ("saw", "whole", "listed"):
            record["asked"] = record["at"] - 5
    middle = next(r["at"] for r in history if r["kind"] == "saw")
    kills = [{"at": middle + 1, "what": "server", "how": "random", "pid": 1}]
    return history, kills, [r | {"at": 0} for r in unharmed]


def verdict(folder: Path, parts, model: Path | None = None):
    paths = []
    for name, records in zip(("history", "kills", "unharmed"), parts, strict=True):
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(r) + "\n" for r in records))
    return check([paths[0]], kills=paths[1], unharmed=[paths[2]], model=model)


def test_a_faultless_run_passes_and_is_counted(tmp_path, good, model) -> None:
    report = verdict(tmp_path, good, model)
    assert report.faults == []
    counts = report.counts
    assert counts["accepted"] == counts["delivered"] == counts["redelivered"] == 3
    assert counts["tokens"] == counts["tokens recomputed"] == 27
    assert counts["unknown outcomes"] == 2
    assert counts["kills"] == counts["kills of a server in mid-stream"] == 1


def own(parts):
    """A copy in which nothing is shared, not even between its records."""
    return json.loads(json.dumps(parts))


def find(records, kind, **fields):
    return next(
        r for r in records if r["kind"] == kind and all(r.get(k) == v for k, v in fields.items())
    )


def whole(history, rollout_id="ro-00"):
    return [r["rollout"] for r in history if r["kind"] == "whole" and r["id"] == rollout_id]


def drop(records, kind, **fields):
    records[:] = [
        r for r in records if r["kind"] != kind or any(r.get(k) != v for k, v in fields.items())
    ]


def change_all(history, unharmed, name, value):
    """As a server that is wrong with and without kills."""
    for rollout in whole(history) + [r["rollout"] for r in unharmed if r["of"] == "ro-00"]:
        rollout[name] = value(rollout[name])
    drop(history, "saw", id="ro-00")


def late(history, kind, **fields):
    at = history[-1]["at"] + 10
    history.append({"kind": kind, "at": at, "asked": at - 1, **fields})


def swap(ids):
    return [(ids[0] + 1) % 490, *ids[1:]]


# how a run can be wrong → the invariant that says so
WRONG = {
    "an accepted rollout is never delivered": (
        "I1: ro-00 was accepted and never",
        lambda h, k, u: drop(h, "whole", id="ro-00"),
    ),
    "an unknown outcome stays unknown": (
        "I1: key k0",
        lambda h, k, u: drop(h, "submit", phase="ok", key="k0"),
    ),
    "a key gives other ids the second time": (
        "I1: key k0",
        lambda h, k, u: h.append(
            find(h, "submit", phase="ok", key="k0") | {"rollout_ids": ["x", "y"], "at": 10**7}
        ),
    ),
    "an accepted rollout is forgotten": (
        "I1: ro-00 was accepted and is not known",
        lambda h, k, u: h.append({"kind": "gone", "id": "ro-00", "at": 86, "asked": 85}),
    ),
    "something is left at the end": (
        "I1: not acknowledged",
        lambda h, k, u: find(h, "listed")["ids"].append("ro-00"),
    ),
    "the client waits for ever": ("I1: the client did not", lambda h, k, u: drop(h, "done")),
    "a rollout failed": (
        "I1: ro-00 ended as failed",
        lambda h, k, u: [r.update(state="failed") for r in whole(h)],
    ),
    "a rollout was aborted by nobody": (
        "I1: ro-00 was aborted",
        lambda h, k, u: [r.update(state="aborted") for r in whole(h)],
    ),
    "delivered after it was acknowledged": (
        "I2: ro-00 was delivered after",
        lambda h, k, u: late(h, "whole", id="ro-00", rollout=whole(h)[0]),
    ),
    "listed after it was acknowledged": (
        "I2: ro-00 is listed after",
        lambda h, k, u: late(h, "listed", ids=["ro-00"]),
    ),
    "redelivered with another text": (
        "I2: ro-00 was delivered twice",
        lambda h, k, u: whole(h)[1].update(created_s=1),
    ),
    "other tokens were streamed": (
        "I3: ro-00",
        lambda h, k, u: find(h, "saw", id="ro-00").update(ids=[999]),
    ),
    "another logprob was streamed": (
        "I3: ro-00",
        lambda h, k, u: find(h, "saw", id="ro-00").update(lp=[-1.0]),
    ),
    "published tokens were lost": (
        "I3: ro-00: 4 tokens were seen, then 2",
        lambda h, k, u: find(h, "saw", id="ro-00", num=4).update(
            num=2, ids=whole(h)[0]["output_ids"][:2], lp=whole(h)[0]["lp_sampled"][:2]
        ),
    ),
    "a token differs from the unharmed run": (
        "I4: ro-00: output_ids differ from the unharmed run at token 0",
        lambda h, k, u: u[0]["rollout"].update(output_ids=swap(u[0]["rollout"]["output_ids"])),
    ),
    "a logprob differs in its last bit": (
        "I4: ro-00: lp_temp differ",
        lambda h, k, u: u[0]["rollout"]["lp_temp"].__setitem__(
            3, math.nextafter(u[0]["rollout"]["lp_temp"][3], 0)
        ),
    ),
    "a token that the definition does not draw": (
        "I4: ro-00 (seed 1000): token 0",
        lambda h, k, u: change_all(h, u, "output_ids", swap),
    ),
    "noise of another position": (
        "I4: ro-00 (seed 1001)",
        lambda h, k, u: change_all(h, u, "seed", lambda seed: seed + 1),
    ),
    "a logprob that the definition does not have": (
        "I4: ro-00 (seed 1000): token 2: lp_sampled",
        lambda h, k, u: change_all(
            h, u, "lp_sampled", lambda lps: [*lps[:2], lps[2] - 1e-3, *lps[3:]]
        ),
    ),
    "a column is short": (
        "I5: ro-00",
        lambda h, k, u: [r.update(flags=r["flags"][:-1]) for r in whole(h)],
    ),
    "a version stamp is dropped": (
        "I5: ro-00",
        lambda h, k, u: [r.update(versions=[[0, 4]]) for r in whole(h)],
    ),
    "a segment says no digest": (
        "I5: ro-00",
        lambda h, k, u: [r["segments"][1].update(digest="") for r in whole(h)],
    ),
    "usage counts other tokens": (
        "I5: ro-00",
        lambda h, k, u: [r["usage"].update(completion_tokens=8) for r in whole(h)],
    ),
    "metadata comes back changed": (
        "I5: ro-00",
        lambda h, k, u: [r.update(metadata={}) for r in whole(h)],
    ),
    "text is not that of the tokens": (
        "I5: ro-00: its text",
        lambda h, k, u: [r.update(text="x" + r["text"][1:]) for r in whole(h)],
    ),
    "it ended too early": (
        "I5: ro-00: ended by length",
        lambda h, k, u: [
            r["body"]["sampling"].update(max_tokens=12)
            for r in h
            if r["kind"] == "submit" and r["key"] == "k0" and "body" in r
        ],
    ),
    "two rollouts share a seed": (
        "I5: ro-01 and ro-00 share",
        lambda h, k, u: [r.update(seed=1000) for r in whole(h, "ro-01")],
    ),
    "the seed is not the one that was asked": (
        "I5: ro-10: seed 3",
        lambda h, k, u: [r.update(seed=3) for r in whole(h, "ro-10")],
    ),
    "a sibling is missing": (
        "I8: key k0",
        lambda h, k, u: find(h, "submit", phase="ok", key="k0")["rollout_ids"].pop(),
    ),
    "a sibling is in another group": (
        "I8: ro-00 is x/0",
        lambda h, k, u: [r.update(group_id="x") for r in whole(h)],
    ),
    "no kill hit a stream": (
        "harness: no kill hit the middle",
        lambda h, k, u: k[0].update(at=1),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_way_of_being_wrong_is_named(tmp_path, good, model, name) -> None:
    expected, change = WRONG[name]
    parts = own(good)
    change(*parts)
    # the definition takes a while: only where it is what finds the fault
    needs_model = expected.startswith("I4: ro-00 (seed") or "text" in expected
    faults = verdict(tmp_path, parts, model if needs_model else None).faults
    assert any(fault.startswith(expected) for fault in faults), faults


def test_a_stop_string_that_was_passed_over_is_named(tmp_path, good, model) -> None:
    parts = own(good)
    text = next(r for r in whole(parts[0]) if len(r["text"]) > 4)["text"]
    for record in parts[0]:
        if record["kind"] == "submit" and record["key"] == "k0" and "body" in record:
            record["body"]["sampling"]["stop"] = [text[1:3]]
    faults = verdict(tmp_path, parts, model).faults
    assert any("a stop string was passed over" in fault for fault in faults), faults


def test_the_programs_import_nothing_of_everstep() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import checker, client, harness, history, victims; "
        "print([m for m in sys.modules if m.split('.')[0] in ('everstep', 'torch', 'msgspec')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_point_and_every_bug_has_its_place_in_the_code() -> None:
    """A patch whose target was renamed would make a server fail, or test nothing."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from faults import BUGS, PLACES, POINTS, plant\n"
        "from harness import FAILPOINTS\n"
        "assert FAILPOINTS.keys() <= POINTS.keys()\n"
        "for point in POINTS: plant(f'die:{point}:1:/dev/null', PLACES[point])\n"
        "for bug, (place, _, _) in BUGS.items(): plant(f'bug:{bug}', place)\n"
        "plant('compact_often', 'server')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_checker_ends_with_a_verdict_and_an_exit_code(tmp_path, good, model) -> None:
    verdict(tmp_path, good)
    command = [sys.executable, HERE / "checker.py", "--history", tmp_path / "history.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "VERDICT: no fault")
    parts = own(good)
    drop(parts[0], "whole", id="ro-00")
    verdict(tmp_path, parts)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "VERDICT: 1 faults")


def test_the_engine_draws_what_the_reference_draws(model, ring) -> None:
    """Two makers of the same numbers; a wrong definition on either side would part them."""
    from everstep import LLM
    from everstep.engine.rollout import SamplingParams

    rng = random.Random(4)
    kinds = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.7, "repetition_penalty": 1.2},
        {"top_k": 7, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"min_p": 0.1, "temperature": 1.5, "min_tokens": 5, "logit_bias": {1: 3.0, 9: -4.0}},
    ]
    sent = [kind | {"max_tokens": 60, "ignore_eos": True} for kind in kinds * 2]
    prompts = [[rng.randrange(490) for _ in range(rng.randrange(1, 40))] for _ in sent]
    with LLM(str(model), seed=3, num_threads=1) as llm:
        rollouts = llm.generate(prompts, [SamplingParams(**kind) for kind in sent])
    for prompt, kind, rollout in zip(prompts, sent, rollouts, strict=True):
        output = {
            name: getattr(rollout, name)
            for name in ("seed", "output_ids", "lp_sampled", "lp_temp", "kept_mass")
        }
        found = judge(ring, prompt, output, Sampling.of(kind))
        assert found.fault is None
        assert found.num_judged + found.num_unclear == 60
        output["seed"] += 1
        if kind.get("temperature") != 0.0:
            assert judge(ring, prompt, output, Sampling.of(kind)).fault


def test_philox_gives_the_published_vectors() -> None:
    # Random123's kat_vectors: philox4x32-10, counter 0, key 0: 6627e8d5 e169c58d …
    assert philox(0, 0) == (0x6627E8D5E169C58D >> 11) * 2.0**-53
