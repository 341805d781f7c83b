"""Every metric against its definition in plain Python, by lag; parts and ranks add up."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.trainer_bridge.losses.config import GatesConfig, KlConfig, LossConfig
from everstep.trainer_bridge.losses.losses import make_loss
from everstep.trainer_bridge.losses.metrics import ALIASES, GROUPS, NAMES, LossMetrics, metrics_of

from .loss_batches import log_tokens, packed, padded
from .loss_reference import Token, is_valid
from .test_loss_examples import numbered
from .test_losses import batches

CONFIG = LossConfig(gates=GatesConfig(veto=0.05), kl=KlConfig(coef=0.01))


def with_columns(batch, lags, **more):
    """Padded inputs with lag and entropy; the entropy of a token is its lag plus a half, and its
    old policy is the proximal one where the lag is 2 or more."""
    inputs = padded(batch, with_ref=True, **more)
    lag = torch.zeros(inputs.mask.shape, dtype=torch.int64)
    for row, values in enumerate(lags):
        lag[row, : len(values)] = torch.tensor(values, dtype=torch.int64)
    return replace(inputs, lag=lag, entropy=lag.double() + 0.5, proximal=lag >= 2)


def mean_of(values):
    values = list(values)
    return fmean(values) if values else None


def expected_of(batch, lags, out, wanted):
    """The metrics of the tokens whose lag is `wanted`, from their definitions."""
    chosen = []
    for row, sequence in enumerate(batch):
        chosen.append(
            [
                (t, lags[row][place], out.keep[row, place].item(), row, place)
                for place, t in enumerate(sequence)
                if t.is_response and wanted(lags[row][place])
            ]
        )
    flat = [one for row in chosen for one in row]
    if not flat:
        return {}
    valid = [t for t, *_ in flat if is_valid(t)]
    gap = [t.old - t.infer for t in valid]
    own = [(t, keep) for t, _, keep, row, place in flat if not out.gated[row, place]]
    apart = [abs(math.exp(t.old) - math.exp(t.infer)) for t in valid]
    weights = [out.weight[row, place].item() for *_, row, place in flat]
    means = [
        fmean(t.old - t.infer for t, *_ in row if is_valid(t))
        for row in chosen
        if any(is_valid(t) for t, *_ in row)
    ]
    rows = [row for row in chosen if row]
    found = {
        "tokens": len(flat),
        "sequences": len(rows),
        "invalid": len(flat) - len(valid),
        "mask_fraction": mean_of(not keep for _, _, keep, *_ in flat),
        "mask_fraction_low": sum(not keep and t.old < t.infer for t, keep in own) / len(flat),
        "mask_fraction_high": sum(not keep and t.old > t.infer for t, keep in own) / len(flat),
        "mask_fraction_gate": 1 - len(own) / len(flat),
        "mask_fraction_positive": mean_of(not k for t, _, k, *_ in flat if t.advantage > 0),
        "mask_fraction_negative": mean_of(not k for t, _, k, *_ in flat if t.advantage < 0),
        "log_ratio_abs_mean": mean_of(map(abs, gap)),
        "log_ratio_abs_std": pstdev(map(abs, gap)) if gap else None,
        "log_ratio_abs_max": max(map(abs, gap), default=None),
        "kl_k1": mean_of(-d for d in gap),
        "kl_k2": mean_of(d * d / 2 for d in gap),
        "kl_k3": mean_of(math.exp(d) - 1 - d for d in gap),
        "exp_log_ratio_abs": mean_of(math.exp(abs(d)) for d in gap),
        "prob_diff_mean": mean_of(apart),
        "prob_diff_max": max(apart, default=None),
        "ratio_beyond_2": mean_of(abs(d) > math.log(2) for d in gap),
        "ratio_beyond_5": mean_of(abs(d) > math.log(5) for d in gap),
        "ess": sum(weights) ** 2 / (len(flat) * sum(w * w for w in weights)) if any(weights) else 0,
        "clip_fraction": mean_of(out.clipped[row, place].item() for *_, row, place in flat),
        "proximal_fraction": mean_of(lag >= 2 for _, lag, *_ in flat),
        "entropy": mean_of(lag + 0.5 for _, lag, *_ in flat),
        "entropy_masked": mean_of(lag + 0.5 for _, lag, keep, *_ in flat if not keep),
        "kl_reference": mean_of(out.kl[row, place].item() for *_, row, place in flat),
        "lag_mean": mean_of(lag for _, lag, *_ in flat),
        "lag_max": max(lag for _, lag, *_ in flat),
        "sequences_masked_any": mean_of(any(not k for _, _, k, *_ in row) for row in rows),
        "sequences_masked_all": mean_of(all(not k for _, _, k, *_ in row) for row in rows),
        "mixed_version_sequences": mean_of(len({one[1] for one in row}) > 1 for row in rows),
    }
    if means:
        found["ratio_geometric_min"] = math.exp(min(means))
        found["ratio_geometric_max"] = math.exp(max(means))
        for name, share in (("p01", 0.01), ("p50", 0.5), ("p99", 0.99)):
            found[f"ratio_geometric_{name}"] = math.exp(quantile(sorted(means), share))
    return {name: value for name, value in found.items() if value is not None}


def quantile(values, share):
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


WANTED = {
    "": lambda lag: True,
    "/lag0": lambda lag: lag == 0,
    "/lag1": lambda lag: lag == 1,
    "/lag2": lambda lag: lag == 2,
    "/lag3+": lambda lag: lag >= 3,
}


@settings(max_examples=60, deadline=None)
@given(batches(), st.data())
def test_every_metric_is_its_definition_for_every_lag(batch, data):
    lags = [[data.draw(st.integers(0, 5)) for _ in sequence] for sequence in batch]
    inputs = with_columns(batch, lags)
    out = make_loss(CONFIG)(inputs)
    found = metrics_of(inputs, out)
    expected = {}
    for suffix, wanted in WANTED.items():
        values = expected_of(batch, lags, out, wanted)
        expected |= {name + suffix: value for name, value in values.items()}
    for name, others in ALIASES.items():
        expected |= {other: expected[name] for other in others if name in expected}
    # to the width of a bin: below
    found = {name: value for name, value in found.items() if "_p99" not in name or "geo" in name}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@settings(max_examples=40, deadline=None)
@given(batches(max_size=5), st.data())
def test_parts_merge_to_the_whole_however_they_lie(batch, data):
    batch = [sequence or [Token(-1.0, -1.0, -1.0, is_response=False)] for sequence in batch]
    lags = [[data.draw(st.integers(0, 4)) for _ in sequence] for sequence in batch]
    loss = make_loss(CONFIG)
    inputs = with_columns(batch, lags)
    whole = metrics_of(inputs, loss(inputs))
    parts = LossMetrics()
    for sequence, row in zip(batch, lags, strict=True):
        part, one = LossMetrics(), with_columns([sequence], [row])
        part.add(one, loss(one))
        parts.merge(part)
    assert parts.values() == pytest.approx(whole, rel=1e-9, abs=1e-9)
    row = packed(batch, [range(len(batch))], with_ref=True)
    lag = torch.tensor([[lag for values in lags for lag in values]], dtype=torch.int64)
    row = replace(row, lag=lag, entropy=lag.double() + 0.5, proximal=lag >= 2)
    assert metrics_of(row, loss(row)) == pytest.approx(whole, rel=1e-9, abs=1e-9)


def test_what_was_not_given_has_no_metric():
    inputs = padded(numbered([1, 3, 8, 9], [6, 7]))
    found = metrics_of(inputs, make_loss(LossConfig())(inputs))
    absent = ("entropy", "entropy_masked", "kl_reference", "lag_mean", "proximal_fraction")
    assert not [name for name in found if name.split("/")[0] in absent or "/lag" in name]
    assert "mixed_version_sequences" not in found
    assert found["mask_fraction"] == pytest.approx(1 / 6)
    assert found["mask_fraction_low"] == found["is_masked_low"] == found["mask_fraction"]


@given(
    gaps=st.lists(st.floats(-25, 25, width=32), min_size=1, max_size=300),
    scale=st.sampled_from([0.0, 1e-5, 1.0]),
)
def test_99_tokens_of_100_are_at_or_below_p99(gaps, scale):
    sequence = [Token(-30.0, -30.0, -30.0 - gap * scale) for gap in gaps]
    inputs = padded([sequence])
    output = make_loss(LossConfig())(inputs)
    found = metrics_of(inputs, output)
    sizes = sorted(output.log_ratio.double().abs().flatten().tolist())
    exact = sizes[math.ceil(0.99 * len(sizes)) - 1]
    if exact <= 2**-24:
        assert found["log_ratio_abs_p99"] == 0
    else:
        assert exact <= found["log_ratio_abs_p99"] <= exact * 2**0.126


def test_no_tokens_have_no_metrics():
    inputs = padded([[]])
    assert metrics_of(inputs, make_loss(LossConfig())(inputs)) == {}
    assert LossMetrics().values() == {}


def test_all_masked_has_no_effective_sample():
    inputs = padded([log_tokens([(0.5, 0.5, 0.01, 1.0)] * 3)])
    found = metrics_of(inputs, make_loss(LossConfig())(inputs))
    assert found["ess"] == 0.0
    assert found["sequences_masked_all"] == 1.0
    assert found["mask_fraction_high"] == 1.0


def test_infinite_ratios_are_too_low_or_too_high():
    sequence = [Token(-1.0, -1.0, -math.inf), Token(-1.0, -math.inf, -1.0), Token(-1.0, -1.0, -1.0)]
    inputs = padded([sequence])
    found = metrics_of(inputs, make_loss(LossConfig())(inputs))
    assert found["mask_fraction_low"] == found["mask_fraction_high"] == pytest.approx(1 / 3)
    assert found["invalid"] == found["icepop/invalid"] == 2
    assert found["log_ratio_abs_max"] == 0.0


RANK = """
import sys, torch, torch.distributed as dist
from everstep.trainer_bridge.losses.metrics import LossMetrics
from everstep.trainer_bridge.losses.losses import LossInputs, make_loss
from everstep.trainer_bridge.losses.config import LossConfig

rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
infer = torch.tensor([[-1.0, -2.0], [-0.5, -3.0], [-1.5, -1.5]])
new = infer + torch.tensor([[0.1, -0.2], [2.0, 0.0], [-0.3, 0.4]])
lag = torch.tensor([[0, 1], [1, 1], [3, 3]])
metrics, loss = LossMetrics(), make_loss(LossConfig())
def add(metrics, rows):
    inputs = LossInputs(new[rows], infer[rows], torch.ones(len(new[rows]), 1),
                        torch.ones_like(new[rows], dtype=torch.bool), lag=lag[rows])
    metrics.add(inputs, loss(inputs))
# a rank may hold fewer sequences than the other
add(metrics, slice(0, 1) if rank else slice(1, 3))
metrics.gather(torch.device("cpu"))
alone = LossMetrics()
add(alone, slice(0, 3))
got, wanted = metrics.values(), alone.values()
assert set(got) == set(wanted), set(got) ^ set(wanted)
assert all(abs(got[k] - wanted[k]) < 1e-9 for k in wanted), (got, wanted)
empty = LossMetrics()
empty.gather(torch.device("cpu"))
assert empty.values() == {}
dist.destroy_process_group()
"""


def test_ranks_gather_the_metrics_of_the_update(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ends


def test_names_are_unique():
    ours = set(ALIASES)
    theirs = [other for others in ALIASES.values() for other in others]
    assert len(theirs) == len(set(theirs))
    assert not ours & set(theirs)
    assert len(GROUPS) == len(WANTED)


def documented(table):
    """Names of the first cells: `kl_k1`, `kl_k2`; `mask_fraction`, `_low`; `ratio_p01`, `_p50`."""
    for row in table.splitlines():
        names = re.findall(r"`(\w+)`", row.split("|")[1])
        yield from (name for name in names if not name.startswith("_"))
        for suffix in (name for name in names if name.startswith("_")):
            yield names[0] + suffix
            yield names[0].rpartition("_")[0] + suffix


def test_the_page_names_every_metric():
    batch = numbered([1, 3, 8, 9], [6, 7])
    inputs = with_columns(batch, [[0, 1, 2, 3], [0, 0]])
    found = LossMetrics()
    found.add(inputs, make_loss(CONFIG)(inputs))
    page = Path(__file__).parents[2].joinpath("docs/explain/icepop.md").read_text("utf-8")
    table = page.partition("| name | what | elsewhere |\n|---|---|---|\n")[2].partition("\n\n")[0]
    ours = {name for name in found.values(aliases=False) if "/" not in name}
    assert ours <= set(documented(table))
    # of which the reference is made; what a batch has not was not given here
    not_here = {"entropy", "entropy_masked", "kl_reference"}
    assert ours | not_here == set(NAMES)
    aliases = {other for others in ALIASES.values() for other in others}
    assert {other for other in aliases if other.split("_")[-1] not in table} == set()
