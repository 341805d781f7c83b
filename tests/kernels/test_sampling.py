"""From logits to a token: the fixed order, the support, the draw and every number beside it."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from everstep.kernels import Rule, reference, sampling, top_of
from everstep.kernels.sampling import log_softmax, sample

from ..tolerances import CHI_SQUARE_SIGMAS, LOGPROB, logprob_tolerance
from .draws import assert_same_bits, few, folded, many, poisoned, random, seeds  # noqa: F401

VOCABS = (1, 2, 3, 17, 63, 511, 512, 513, 1025, 1500)
# the largest multiple of 2^-53 below 1
LAST_U = 1.0 - 2.0**-53
ALL = {"wants_raw": True, "wants_entropy": True, "wants_kept_ids": True}


def draw(logits, **rule):
    """One row (a list or a tensor); seed 0 and position 0 unless given."""
    row = torch.as_tensor(logits, dtype=torch.float32)
    return sample(row.unsqueeze(0), [Rule(**{"seed": 0, "position": 0} | rule)])[0]


def support(logits, **rule):
    """Kept ids, by the draw's own account."""
    got = draw(logits, wants_kept_ids=True, **rule)
    return got.kept_ids if got.is_cut else list(range(len(logits)))


@pytest.fixture
def at(monkeypatch):
    """Make the next draws use these uniform numbers."""

    def install(*values):
        numbers = torch.tensor(values, dtype=torch.float64).numpy()
        monkeypatch.setattr(sampling, "uniforms", lambda seeds, positions: numbers)

    return install


def rules():
    """Every field of a rule; values off the borders that float32 could cross either way."""
    return st.fixed_dictionaries(
        {
            "seed": st.integers(-(2**63), 2**63 - 1),
            "position": st.integers(0, 2**20),
            "temperature": st.sampled_from([0.0, 0.05, 0.7, 1.0, 1.0, 2.5]),
            "top_p": st.sampled_from([1.0, 1.0, 0.9371, 0.5113, 0.0117]),
            "top_k": st.sampled_from([0, -1, 1, 2, 7, 600, 10**6]),
            "min_p": st.sampled_from([0.0, 0.0, 0.01173, 0.3117]),
            "presence_penalty": st.sampled_from([0.0, 0.5, -2.0]),
            "frequency_penalty": st.sampled_from([0.0, 0.25, -0.5]),
            "repetition_penalty": st.sampled_from([1.0, 1.25, 0.5]),
            "logit_bias": st.sampled_from([{}, {0: 100.0}, {0: -100.0}, {0: 1.5, -1: -2.0}]),
            "prompt_ids": st.sampled_from([(), (0, 0, -1), (5, 5, 9)]),
            "output_ids": st.sampled_from([(), (0, 0, 0), (1, -1, 1, 7)]),
            "banned": st.sampled_from([(), (), (0,), (0, 1, 0), (2, 5, -1)]),
            "num_top": st.sampled_from([0, 1, 5, 64]),
            "top_of": st.sampled_from(["raw", "temp", "sampled"]),
        }
    )


def make_rule(fields, vocab):
    """Ids brought into the vocabulary."""
    fields = dict(fields)
    for name in ("prompt_ids", "output_ids", "banned"):
        fields[name] = tuple(i % vocab for i in fields[name])
    fields["logit_bias"] = {i % vocab: value for i, value in fields["logit_bias"].items()}
    return Rule(**ALL, **fields)


def are_decided(lp, rule, kept):
    """Whether no id is so near a border of the support that float32 may put it on either side."""
    alive = [i for i in range(len(lp)) if i not in rule.banned] or range(len(lp))
    ids = sorted(alive, key=lambda i: (-lp[i], i))
    gaps = [lp[a] - lp[b] for a, b in pairwise(ids)]
    if any(1e-12 < gap < 1e-4 for gap in gaps):
        return False
    if rule.top_k > 0:
        ids = ids[: rule.top_k]
    shares = [math.exp(lp[i] - lp[ids[0]]) for i in ids]
    whole, before = math.fsum(shares), 0.0
    for share in shares:
        near_p = rule.top_p < 1.0 and abs(before / whole - rule.top_p) < 1e-6
        if near_p or abs(share - rule.min_p) < 1e-6 * rule.min_p:
            return False
        before += share
    return True


# -- against the definition


@settings(many, max_examples=150)
@given(st.sampled_from(VOCABS), st.sampled_from([0.25, 1.0, 8.0]), rules(), seeds)
def test_a_draw_is_the_definition_in_every_number(vocab, step, fields, seed):
    # logits on a grid: exact ties are common, near ties are not
    logits = (random(seed, vocab, scale=6.0 / step).round() * step).float()
    rule = make_rule(fields, vocab)
    expected = reference.sample(logits, rule)
    lp = reference.tempered(logits.tolist(), rule).tolist()
    assume(are_decided(lp, rule, expected.kept_ids))
    got = sample(logits.unsqueeze(0), [rule])[0]
    close = logprob_tolerance(reference.penalised(logits.tolist(), rule), rule.temperature)

    assert got.is_cut == expected.is_cut
    assert got.kept_ids == (expected.kept_ids if got.is_cut else [])
    assert_is_drawn_at(got.token_id, lp, expected.kept_ids, rule, close)
    raw = reference.log_softmax(logits).tolist()
    mass = reference.log_mass(lp, expected.kept_ids)
    assert got.lp_temp == pytest.approx(lp[got.token_id], abs=close)
    assert got.lp_sampled == pytest.approx(lp[got.token_id] - mass, abs=2 * close)
    assert got.kept_mass == pytest.approx(math.exp(mass), rel=close, abs=0.0)
    assert got.lp_raw == pytest.approx(raw[got.token_id], abs=logprob_tolerance(logits.tolist()))
    assert got.entropy == pytest.approx(expected.entropy, abs=10 * close)
    if rule.num_top:
        assert_tops_close(got.top, expected.top, 2 * close)
    else:
        assert got.top is None
    assert_relations(got)


def assert_is_drawn_at(token, lp, kept, rule, close):
    """The uniform number of (seed, position) lies where the token lies in the distribution."""
    assert token in kept
    top = max(lp[i] for i in kept)
    weights = [math.exp(lp[i] - top) for i in kept]
    place = kept.index(token)
    whole, below = math.fsum(weights), math.fsum(weights[:place])
    u = reference.uniform(rule.seed, rule.position)
    assert below / whole - close <= u <= (below + weights[place]) / whole + close


def assert_tops_close(got, expected, close):
    assert [i for i, _ in got] == [i for i, _ in expected]
    for (_, value), (_, wanted) in zip(got, expected, strict=True):
        assert value == pytest.approx(wanted, abs=close)


def assert_relations(got):
    """What holds between the numbers of one draw, whatever they are."""
    for value in (got.lp_sampled, got.lp_temp, got.kept_mass, got.lp_raw, got.entropy):
        assert value is not None
        assert math.isfinite(value)
    assert got.lp_sampled <= 0.0
    assert got.lp_temp <= 0.0
    assert 0.0 <= got.kept_mass <= 1.0
    if got.kept_mass > 0.0:
        assert got.lp_sampled == pytest.approx(got.lp_temp - math.log(got.kept_mass), abs=1e-6)
    for _, value in got.top or []:
        assert math.isfinite(value)
        assert value <= 0.0


@few
@given(st.sampled_from([*VOCABS, 5000]), st.sampled_from([0.1, 1.0, 20.0]), seeds)
def test_log_softmax_is_the_definition(vocab, scale, seed):
    logits = random(seed, 3, vocab, scale=scale)
    error = (log_softmax(logits).double() - reference.log_softmax(logits)).abs()
    assert error.max() <= logprob_tolerance(logits.flatten().tolist())


def test_log_softmax_keeps_its_digits_beside_large_logits():
    logits = torch.tensor([[30000.0, 30000.0, 30000.0, 30001.0]])
    error = (log_softmax(logits).double() - reference.log_softmax(logits)).abs()
    assert error.max() < LOGPROB


@few
@given(st.sampled_from([1, 2, 63, 700]), seeds)
def test_log_softmax_sums_in_the_order_of_the_tree(vocab, seed):
    logits = random(seed, 3, vocab, scale=3.0)
    shifted = logits - logits.max(-1, keepdim=True).values
    total = torch.stack([folded(row) for row in torch.exp(shifted)])
    assert_same_bits(log_softmax(logits), shifted - torch.log(total).unsqueeze(-1))


def test_log_softmax_of_a_large_vocabulary_sums_to_one():
    logits = random(0, 2, 151_000, scale=3.0)
    assert torch.exp(log_softmax(logits).double()).sum(-1).tolist() == pytest.approx(
        [1.0, 1.0], abs=1e-6
    )


# -- the order, and penalties


def test_penalties_and_bias_come_before_the_temperature():
    got = draw(
        [1.0, 0.0],
        temperature=0.5,
        logit_bias={1: 1.0},
        frequency_penalty=1.0,
        output_ids=(0,),
        num_top=2,
        top_of="temp",
    )
    expected = torch.log_softmax(torch.tensor([0.0, 2.0]), 0)
    assert dict(got.top) == pytest.approx({0: expected[0].item(), 1: expected[1].item()}, abs=1e-6)


def test_bans_come_before_top_k():
    assert support([3.0, 2.0, 1.0, 0.0], banned=(0,), top_k=2) == [1, 2]


def test_top_k_comes_before_top_p():
    # 0.4 of all is 0.8 of what top_k leaves
    logits = [math.log(p) for p in (0.4, 0.1, 0.3, 0.2)]
    assert support(logits, top_k=1, top_p=0.75) == [0]
    assert support(logits, top_k=2, top_p=0.55) == [0]
    assert support(logits, top_p=0.55) == [0, 2]


def test_top_p_counts_what_the_bans_leave():
    logits = [math.log(p) for p in (0.6, 0.22, 0.1, 0.08)]
    assert support(logits, banned=(0,), top_p=0.5) == [1]


def test_min_p_is_relative_to_the_best_kept_id():
    logits = [math.log(p) for p in (0.6, 0.2, 0.15, 0.05)]
    assert support(logits, min_p=0.5) == [0]
    assert support(logits, banned=(0,), min_p=0.5) == [1, 2]


def test_the_temperature_comes_before_the_cuts():
    logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
    assert support(logits, min_p=0.5) == [0, 1]
    assert support(logits, min_p=0.5, temperature=0.5) == [0]
    assert support(logits, top_p=0.6, temperature=0.5) == [0]


@many
@given(st.sampled_from([2, 9, 40]), rules(), seeds)
def test_penalties_are_those_of_a_loop(vocab, fields, seed):
    logits = random(seed, vocab, scale=3.0)
    logits[0] = 0.0
    rule = make_rule(fields, vocab)
    changed = logits.clone()
    sampling.penalise(changed, rule)
    expected = reference.penalised(logits.tolist(), rule)
    assert changed.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-5)


def temp_of(logits, **rule):
    got = draw(logits, num_top=len(logits), top_of="temp", **rule)
    return torch.tensor([lp for _, lp in sorted(got.top)])


def test_repetition_penalty_divides_what_is_positive_and_multiplies_the_rest_once():
    got = temp_of([2.0, -2.0, 1.0], repetition_penalty=2.0, prompt_ids=(0, 0), output_ids=(1, 0))
    assert torch.allclose(got, torch.log_softmax(torch.tensor([1.0, -4.0, 1.0]), 0))


def test_presence_counts_once_and_frequency_every_time_over_the_output_alone():
    options = {"prompt_ids": (2, 2), "output_ids": (0, 1, 1)}
    got = temp_of([0.0, 0.0, 0.0], presence_penalty=0.5, **options)
    assert torch.allclose(got, torch.log_softmax(torch.tensor([-0.5, -0.5, 0.0]), 0))
    got = temp_of([0.0, 0.0, 0.0], frequency_penalty=0.5, **options)
    assert torch.allclose(got, torch.log_softmax(torch.tensor([-0.5, -1.0, 0.0]), 0))


@pytest.mark.parametrize(
    "rule",
    [
        {"repetition_penalty": 1e-300, "prompt_ids": (0,)},
        {"temperature": 1e-38, "top_k": 2, "num_top": 2},
        {"temperature": 1e-38, "top_p": 0.5, "wants_entropy": True},
    ],
)
def test_a_row_that_leaves_float32_has_no_draw_and_the_others_have_theirs(rule):
    logits = torch.tensor([[4.0, -3.0, 2.0]] * 2)
    plain = Rule(seed=1, position=0, temperature=0.5)
    lost, other = sample(logits, [Rule(seed=0, position=0, **rule), plain])
    assert lost is None
    assert other == sample(logits[:1], [plain])[0]


def test_a_repetition_penalty_over_nothing_changes_nothing():
    assert draw([1.0, 2.0], repetition_penalty=1.5) == draw([1.0, 2.0])


@pytest.mark.parametrize("bias", [100.0, -100.0])
def test_a_bias_of_100_forces_or_forbids(bias):
    logits = random(0, 200, 600, scale=4.0)
    drawn = sample(logits, [Rule(i, 0, logit_bias={300: bias}, **ALL) for i in range(200)])
    assert {got.token_id == 300 for got in drawn} == {bias > 0}
    for got in drawn:
        assert_relations(got)


def test_lp_raw_sees_neither_penalties_nor_temperature():
    logits = random(0, 20, scale=2.0)
    got = draw(logits, temperature=0.3, logit_bias={4: 9.0}, wants_raw=True, top_k=3)
    assert got.lp_raw == pytest.approx(reference.log_softmax(logits)[got.token_id].item(), abs=1e-6)


# -- the support


def test_equal_probabilities_keep_the_lower_ids():
    logits = [0.0] * 8
    assert support(logits, top_k=3) == [0, 1, 2]
    assert support(logits, top_p=0.5) == [0, 1, 2, 3]
    assert support([0.0, 1.0, 0.0, 1.0, 1.0], top_k=2) == [1, 3]
    assert support([0.0, 1.0, 0.0, 1.0, 1.0], top_k=4) == [0, 1, 3, 4]


def test_top_p_ends_with_the_id_that_reaches_it():
    assert support([0.0] * 4, top_p=0.5) == [0, 1]
    assert support([0.0] * 4, top_p=0.5 + 1e-9) == [0, 1, 2]
    assert support([0.0] * 4, top_p=1e-9) == [0]


def test_min_p_keeps_what_is_equal_to_it():
    assert support([2.0, 2.0, 1.0], min_p=1.0) == [0, 1]
    assert support([0.0, math.log(0.5) + 1e-6], min_p=0.5) == [0, 1]
    assert support([0.0, math.log(0.5) - 1e-6], min_p=0.5) == [0]


def test_a_support_is_never_empty():
    assert support([1.0, 2.0, 3.0], banned=(0, 1, 2)) == [0, 1, 2]
    assert support([1.0, 2.0, 3.0], banned=(0, 1, 2), top_k=1) == [2]
    assert support([1.0, 2.0, 3.0], banned=(2, 2, 2), min_p=1.0, top_p=1e-9) == [1]


@pytest.mark.parametrize("top_k", [0, -1, 5, 6])
def test_a_top_k_that_limits_nothing_cuts_nothing(top_k):
    got = draw(random(0, 5), top_k=top_k, wants_kept_ids=True)
    assert (got.is_cut, got.kept_mass, got.kept_ids) == (False, 1.0, [])
    assert got.lp_sampled == got.lp_temp


@many
@given(
    st.sampled_from([0.5, 4.0, 12.0]),
    st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0 - 1e-9]),
    st.sampled_from([0, 3, 20, 64, 65, 500]),
    st.sampled_from([(), (0,), tuple(range(0, 700, 2))]),
    seeds,
)
def test_partial_selection_finds_the_support_of_the_full_sort(scale, top_p, top_k, banned, seed):
    logits = (random(seed, 700, scale=scale) * 8).round() / 8
    rule = Rule(0, 0, top_p=top_p, top_k=top_k, banned=banned)
    lp = log_softmax(logits.unsqueeze(0))[0]
    before = sampling.PARTIAL
    try:
        sampling.PARTIAL = 64
        partial = sampling._support(lp, rule).tolist()
    finally:
        sampling.PARTIAL = before
    assert partial == sampling._support(lp, rule).tolist()
    if reference.support(lp.tolist(), rule) != partial:
        # float32 and float64 may part at a border of top_p, nowhere else
        assert not are_decided(lp.double().tolist(), rule, partial)


def test_a_partial_selection_is_taken_and_left_by_the_mass_it_holds(monkeypatch):
    sorts = []
    full = torch.sort

    def counted(values, **options):
        sorts.append(values.shape[0])
        return full(values, **options)

    monkeypatch.setattr(torch, "sort", counted)
    peaked = torch.arange(3000) * -0.001
    peaked[:5] = 20.0
    assert support(peaked, top_p=0.9) == [0, 1, 2, 3, 4]
    assert 3000 not in sorts
    assert support(torch.zeros(3000), top_p=0.5) == list(range(1500))
    assert 3000 in sorts


# -- T = 0


def test_greedy_takes_the_lowest_id_among_equals():
    for u in range(5):
        got = draw(
            [0.0, 3.0, 1.0, 3.0],
            temperature=0.0,
            seed=u,
            wants_kept_ids=True,
            num_top=2,
            top_of="sampled",
        )
        assert (got.token_id, got.lp_sampled, got.kept_ids) == (1, 0.0, [1])
        assert got.top == [(1, 0.0)]
        # lp_temp is taken at T = 1
        expected = torch.log_softmax(torch.tensor([0.0, 3.0, 1.0, 3.0]), 0)[1].item()
        assert got.lp_temp == pytest.approx(expected, abs=1e-6)
        assert got.kept_mass == pytest.approx(math.exp(expected), rel=1e-6)


def test_greedy_heeds_bans_and_penalties():
    assert draw([0.0, 3.0, 1.0], temperature=0.0, banned=(1,)).token_id == 2
    assert draw([0.0, 3.0, 1.0], temperature=0.0, logit_bias={0: 9.0}).token_id == 0
    assert draw([0.0, 3.0, 1.0], temperature=0.0, top_k=2, top_p=0.5, min_p=1.0).token_id == 1


# -- the draw


@pytest.mark.parametrize("vocab", [40, 1100])
@pytest.mark.parametrize(
    "cut", [{}, {"temperature": 0.8, "top_k": 9}, {"top_p": 0.7, "min_p": 0.02}]
)
def test_frequencies_of_draws_follow_the_distribution(vocab, cut):
    count = 3000
    logits = random(vocab, vocab, scale=1.5)
    rule = Rule(0, 0, **cut)
    drawn = sample(logits.expand(count, vocab), [Rule(s, 3, **cut) for s in range(count)])
    lp = reference.tempered(logits.tolist(), rule).tolist()
    kept = reference.support(lp, rule)
    mass = reference.log_mass(lp, kept)
    seen = torch.bincount(torch.tensor([d.token_id for d in drawn]), minlength=vocab).tolist()
    assert sum(seen[i] for i in kept) == count
    # cells of at least five expected draws; the rest is one more
    expected = {i: count * math.exp(lp[i] - mass) for i in kept}
    cells = [(seen[i], e) for i, e in expected.items() if e >= 5.0]
    rest = [(seen[i], e) for i, e in expected.items() if e < 5.0]
    if rest:
        cells.append((sum(n for n, _ in rest), sum(e for _, e in rest)))
    statistic, degrees = sum((n - e) ** 2 / e for n, e in cells), len(cells) - 1
    assert abs(statistic - degrees) < CHI_SQUARE_SIGMAS * math.sqrt(2.0 * degrees)


@few
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**33), seeds)
@example(seed=-1, position=0, other=0)
def test_a_draw_depends_on_its_seed_and_position_only(seed, position, other):
    logits = random(0, 1, 700, scale=2.0)
    rule = Rule(seed, position)
    alone = sample(logits, [rule])[0]
    assert sample(logits, [rule])[0] == alone
    # among other rows, after other draws, with another history
    torch.manual_seed(other)
    company = [Rule(other, 1), rule, Rule(other, 2)]
    assert sample(torch.cat([random(other, 1, 700), logits, logits]), company)[1] == alone
    history = Rule(seed, position, prompt_ids=(1, 2), output_ids=(3,) * 9)
    assert sample(logits, [history])[0] == alone
    weights = torch.exp(reference.log_softmax(logits[0])).tolist()
    assert alone.token_id == reference.inverse_cdf(weights, reference.uniform(seed, position))


def test_seeds_and_positions_each_change_the_draw():
    logits = torch.zeros(100, 5000)
    by_seed = sample(logits, [Rule(s, 0) for s in range(100)])
    by_position = sample(logits, [Rule(0, t) for t in range(100)])
    for drawn in (by_seed, by_position):
        assert len({d.token_id for d in drawn}) > 90
    assert sum(a.token_id == b.token_id for a, b in zip(by_seed, by_position, strict=True)) < 5


@few
@given(st.sampled_from([2, 511, 512, 513, 1025, 1500]), st.sampled_from([0.1, 3.0, 30.0]), seeds)
def test_the_token_rises_with_the_uniform_number(vocab, scale, seed):
    logits = random(seed, vocab, scale=scale)
    weights = torch.exp(log_softmax(logits.unsqueeze(0))).double()[0]
    # the borders of all tokens and both sides of each
    borders = (weights.cumsum(0) / weights.sum()).tolist()
    near = [
        b + d
        for b in borders[:: max(1, vocab // 100)]
        for d in (-1e-12, -(2.0**-53), 0.0, 2.0**-53, 1e-12)
    ]
    us = sorted({min(max(u, 0.0), LAST_U) for u in [*near, 0.0, LAST_U]})
    tokens = drawn_at(weights, us)
    assert tokens == sorted(tokens)
    for u, token in zip(us, tokens, strict=True):
        assert weights[token] > 0
        below = math.fsum(weights[:token].tolist()) / weights.sum().item()
        share = weights[token].item() / weights.sum().item()
        assert below - 1e-12 <= u <= below + share + 1e-12


def drawn_at(weights, us):
    """Tokens at each of these uniform numbers, from weights (V,)."""
    numbers = torch.tensor(us, dtype=torch.float64).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "uniforms", lambda seeds, positions: numbers)
        tokens, _ = sampling._draw(weights.double().expand(len(us), -1), [Rule(0, 0)] * len(us))
    return tokens


def test_borders_of_equal_tokens_belong_to_the_upper_one():
    # 1024 equal ids: every cumulative sum is exact
    us = [
        0.0,
        2.0**-53,
        1 / 1024,
        1 / 1024 - 2.0**-53,
        511 / 1024,
        0.5 - 2.0**-53,
        0.5,
        513 / 1024,
        LAST_U,
    ]
    assert drawn_at(torch.full((1024,), 2.0**-10), us) == [0, 0, 1, 0, 511, 511, 512, 513, 1023]
    # 600 equal ids of which the second block holds 88
    assert drawn_at(torch.ones(600), [511.5 / 600, 512.5 / 600, LAST_U]) == [511, 512, 599]


@pytest.mark.parametrize(
    "gap", [(0, 3), (0, 512), (510, 515), (512, 1024), (1024, 1500), (0, 1499), (1, 1500)]
)
def test_ids_without_weight_are_never_drawn(gap):
    weights = torch.ones(1500, dtype=torch.float64)
    weights[gap[0] : gap[1]] = 0.0
    us = [i / 997 for i in range(997)] + [0.0, LAST_U, 0.5, gap[0] / 1500, gap[1] / 1500]
    us += [gap[0] / (1500 - gap[1] + gap[0]), gap[0] / (1500 - gap[1] + gap[0]) - 2.0**-53]
    us = [min(max(u, 0.0), LAST_U) for u in us]
    for token in drawn_at(weights, us):
        assert not gap[0] <= token < gap[1]


def test_a_target_that_rounding_lifts_over_the_end_takes_the_last_id_with_weight():
    # a block's tree sum may exceed its running sum by the last bits
    lifted = 0
    for seed in range(40):
        weights = torch.zeros(1300, dtype=torch.float64)
        weights[:400] = torch.exp(random(seed, 400).double())
        lifted += bool(weights[:512].cumsum(0)[-1] < sampling.tree_sum(weights[:512]) * LAST_U)
        assert drawn_at(weights, [LAST_U]) == [399]
        weights[600:900] = 1.0
        border = (
            sampling.tree_sum(weights[:512]) / (sampling.tree_sum(weights[:512]) + 300.0)
        ).item()
        for u in (border - 2.0**-53, border, border + 2.0**-53):
            assert drawn_at(weights, [u])[0] in (399, 600)
    assert lifted


def test_ids_outside_the_support_are_never_drawn(at):
    logits = random(0, 1, 1100, scale=2.0)
    kept = support(logits[0], top_p=0.6)
    for u in (0.0, 0.25, 0.5, 0.999, LAST_U):
        at(u)
        assert draw(logits[0], top_p=0.6).token_id in kept
    at(0.0)
    assert draw(logits[0], top_p=0.6).token_id == kept[0]
    at(LAST_U)
    assert draw(logits[0], top_p=0.6).token_id == kept[-1]


# -- extremes


EXTREMES = {
    "+-80": [80.0, -80.0] * 300,
    "one above all": [200.0] + [0.0] * 599,
    "one below all": [0.0] * 599 + [-200.0],
    "all equal": [3.0] * 600,
    "all equal and large": [-1e4] * 600,
    "spread": [float(i - 300) for i in range(600)],
    "one id": [5.0],
    "one id, large": [-1e30],
    "two ids far apart": [1e30, -1e30],
    "denormal": [1e-42, 0.0, -1e-42],
}  # fmt: skip


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("temperature", [0.0, 0.001, 1.0, 100.0])
def test_every_number_is_finite_at_the_extremes(name, temperature):
    logits = EXTREMES[name]
    best = max(range(len(logits)), key=lambda i: (logits[i], -i))
    for cut in (
        {},
        {"banned": (best,)},
        {"top_k": 3},
        {"top_p": 0.3},
        {"min_p": 0.9},
        {"banned": (best,), "top_p": 0.9},
    ):
        for top in ("raw", "temp", "sampled"):
            got = draw(logits, temperature=temperature, num_top=4, top_of=top, **ALL, **cut)
            assert 0 <= got.token_id < len(logits)
            assert_relations(got)
            if "banned" in cut and len(logits) > 1:
                assert got.token_id != best


def test_a_ban_may_take_all_the_mass():
    # what is left has underflowed in float32: it is drawn from all the same
    logits = [200.0, 0.0, math.log(3.0)]
    drawn = sample(torch.tensor([logits] * 400), [Rule(s, 0, banned=(0,)) for s in range(400)])
    share = sum(got.token_id == 2 for got in drawn) / 400
    assert 0.65 < share < 0.85
    for got in drawn:
        assert got.lp_sampled == pytest.approx(
            math.log(0.25 if got.token_id == 1 else 0.75), abs=1e-4
        )
        assert got.kept_mass == pytest.approx(4.0 * math.exp(-200.0), rel=1e-4)
    greedy = draw(logits, temperature=0.0, banned=(0,), num_top=1, top_of="sampled")
    assert (greedy.token_id, greedy.lp_sampled, greedy.top) == (2, 0.0, [(2, 0.0)])


def test_a_large_vocabulary_is_drawn_as_the_definition_says():
    logits = random(1, 151_000, scale=3.0)
    for cut in ({}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.95}):
        rule = Rule(11, 5, **cut, **ALL)
        got = sample(logits.unsqueeze(0), [rule])[0]
        lp = reference.tempered(logits.tolist(), Rule(11, 5)).tolist()
        kept = got.kept_ids if got.is_cut else range(len(lp))
        mass = reference.log_mass(lp, kept)
        assert_is_drawn_at(got.token_id, lp, list(kept), rule, 1e-5)
        assert got.lp_sampled == pytest.approx(lp[got.token_id] - mass, abs=5e-6)
        assert_relations(got)


def test_no_rows_give_no_draws():
    assert sample(torch.zeros(0, 600), []) == []


# -- alternatives


def test_alternatives_tie_by_id_and_name_the_drawn_token_with_its_own_number():
    logits = [1.0, 2.0, 2.0, 0.0, 2.0]
    for top, field in (("raw", "lp_raw"), ("temp", "lp_temp"), ("sampled", "lp_sampled")):
        for cut in ({}, {"top_p": 0.9}, {"top_k": 4}, {"top_k": 1}):
            got = draw(logits, temperature=0.7, num_top=5, top_of=top, wants_raw=True, **cut)
            assert [i for i, _ in got.top][:3] == (
                [1, 2, 4] if top != "sampled" or cut != {"top_k": 1} else [1]
            )
            assert dict(got.top)[got.token_id] == getattr(got, field)


def test_alternatives_of_the_sampled_distribution_are_kept_ids():
    got = draw(random(0, 50, scale=2.0), top_k=3, num_top=10, top_of="sampled", wants_kept_ids=True)
    assert sorted(i for i, _ in got.top) == got.kept_ids
    assert math.fsum(math.exp(lp) for _, lp in got.top) == pytest.approx(1.0, abs=1e-6)


@few
@given(st.sampled_from(VOCABS), st.integers(0, 70), seeds)
def test_top_of_lists_the_best_with_ties_by_id(vocab, count, seed):
    lp = (random(seed, vocab, scale=4.0)).round()
    expected = reference.top_of(dict(enumerate(lp.tolist())), count)
    assert top_of(lp, count) == expected


def test_optional_numbers_are_absent_unless_asked_for():
    got = draw(random(0, 9), top_k=2)
    assert (got.lp_raw, got.entropy, got.kept_ids, got.top) == (None, None, None, None)
