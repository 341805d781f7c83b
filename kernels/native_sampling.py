"""DrawArrays of the C++ library (cpu/sampling.cpp): one call for all rows of a step.

A rule is a record of constants (`Rule.record`); what changes from step to step comes as columns.
Python touches only rows that ask for more: changed logits, bans, alternatives, kept ids.

Shapes: N draws, V vocabulary.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from . import sampling
from .sampling import RULE, Draw, DrawArrays, Rule

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SEED = 0xFFFFFFFFFFFFFFFF
# the struct Draw of sampling.cpp
_DRAW = np.dtype(
    [
        *((name, np.int64) for name in ("token", "kept", "tops")),
        *((n, np.float64) for n in ("lp_sampled", "lp_temp", "mass", "lp_raw", "entropy")),
        ("is_lost", np.int64),
    ],
    align=True,
)
Table = npt.NDArray[np.void]
Floats = npt.NDArray[np.float64]


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the types."""
    p, i, n = _POINTER, _INT, _LONG
    library.everstep_sample.argtypes = [p, n, p, n, *[p] * 5, n, i]
    library.everstep_sample.restype = None
    library.everstep_uniforms.argtypes = [p, p, n, p]
    library.everstep_uniforms.restype = None
    library.everstep_log_softmax.argtypes = [p, n, n, p, i]
    library.everstep_log_softmax.restype = None


def uniforms(library: ctypes.CDLL, seeds: Sequence[int], positions: Sequence[int]) -> Floats:
    """`philox.uniforms`, by the library."""
    keys = np.array([seed & _SEED for seed in seeds], dtype=np.uint64)
    counters = np.array(positions, dtype=np.uint64)
    out = np.empty(keys.size)
    library.everstep_uniforms(keys.ctypes.data, counters.ctypes.data, keys.size, out.ctypes.data)
    return out


def log_softmax(library: ctypes.CDLL, logits: torch.Tensor) -> torch.Tensor:
    """(B, V) float32 → (B, V) float32: the numbers that a draw reports as lp_raw."""
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    library.everstep_log_softmax(
        logits.data_ptr(), *logits.shape, out.data_ptr(), torch.get_num_threads()
    )
    return out


def draw(
    library: ctypes.CDLL,
    logits: torch.Tensor,
    rules: Sequence[Rule],
    *,
    seeds: Sequence[int],
    positions: Sequence[int],
    rows: Sequence[int],
) -> DrawArrays:
    """`dispatch.draw`, by the library."""
    count, vocab = len(rules), logits.shape[1]
    logits = logits.contiguous()
    table = np.frombuffer(bytearray(b"".join([rule.record for rule in rules])), dtype=RULE)
    table["u"] = uniforms(library, seeds, positions)
    table["row"] = rows
    special = [n for n, rule in enumerate(rules) if rule.is_special]
    changed = _change_logits(table, logits, rules, special)
    banned = _list_banned(table, rules, special, vocab)
    kept = _make_kept(table, rules, special, vocab)
    most = max((rules[n].num_top for n in special), default=0)
    top_ids, top_lps = np.empty((count, most), dtype=np.int64), np.empty((count, most))
    found = np.zeros(count, dtype=_DRAW)
    library.everstep_sample(
        logits.data_ptr(), vocab, table.ctypes.data, count, banned.ctypes.data, found.ctypes.data,
        kept.ctypes.data, top_ids.ctypes.data, top_lps.ctypes.data, most, torch.get_num_threads(),
    )  # fmt: skip
    del changed  # held until here: the table has its addresses
    draws = DrawArrays(
        token_ids=found["token"],
        lp_sampled=found["lp_sampled"],
        lp_temp=found["lp_temp"],
        kept_mass=found["mass"],
        is_cut=found["kept"] < vocab,
        is_lost=found["is_lost"] != 0,
    )
    for n in special:
        rule = rules[n]
        if not rule.wants_more or draws.is_lost[n]:
            continue
        one = draws.plain(n)
        if rule.wants_raw:
            one.lp_raw = float(found["lp_raw"][n])
        if rule.wants_entropy:
            one.entropy = float(found["entropy"][n])
        if rule.wants_kept_ids:
            ids = kept[table["kept_row"][n], : found["kept"][n]]
            one.kept_ids = ids.tolist() if one.is_cut else []
        if rule.num_top:
            num = found["tops"][n]
            one.top = list(zip(top_ids[n, :num].tolist(), top_lps[n, :num].tolist(), strict=True))
        draws.more[n] = one
    return draws


def draw_list(
    library: ctypes.CDLL, logits: torch.Tensor, rules: Sequence[Rule]
) -> list[Draw | None]:
    """`sampling.sample`, by the library."""
    if not rules:
        return []
    draws = draw(
        library,
        logits,
        rules,
        seeds=[rule.seed for rule in rules],
        positions=[rule.position for rule in rules],
        rows=range(len(rules)),
    )
    return draws.list()


def _change_logits(
    table: Table, logits: torch.Tensor, rules: Sequence[Rule], special: Sequence[int]
) -> torch.Tensor | None:
    """Rows of their own, after penalties and bias, for the rules that have any."""
    changing = [n for n in special if rules[n].changes_logits]
    if not changing:
        return None
    changed = logits[torch.from_numpy(table["row"][changing])]
    for row, n in zip(changed, changing, strict=True):
        sampling.penalise(row, rules[n])
        table["changed"][n] = row.data_ptr()
    return changed


def _list_banned(
    table: Table, rules: Sequence[Rule], special: Sequence[int], vocab: int
) -> npt.NDArray[np.int64]:
    """Banned ids of all rules, one after another."""
    ids: list[int] = []
    for n in special:
        if rules[n].banned:
            table["banned_from"][n], table["banned_count"][n] = len(ids), len(rules[n].banned)
            ids += rules[n].banned
    banned = np.array(ids, dtype=np.int64)
    if banned.size and not 0 <= banned.min() <= banned.max() < vocab:
        raise ValueError(f"banned ids beyond a vocabulary of {vocab}")
    return banned


def _make_kept(
    table: Table, rules: Sequence[Rule], special: Sequence[int], vocab: int
) -> npt.NDArray[np.int32]:
    """Room for the kept ids of the rules that ask for them."""
    wanting = [n for n in special if rules[n].wants_kept_ids]
    table["kept_row"][wanting] = np.arange(len(wanting))
    return np.empty((len(wanting), vocab), dtype=np.int32)
