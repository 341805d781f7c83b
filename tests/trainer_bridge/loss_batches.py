"""Batches of tokens as the tensors that losses take: padded or packed."""

import math

import torch

from everstep.trainer_bridge.losses.losses import LossInputs

from .loss_reference import Token

COLUMNS = {"lp_new": "new", "lp_old": "old", "lp_infer": "infer", "advantages": "advantage"}
JUNK = math.nan


def padded(batch, /, *, dtype=torch.float64, width=None, left=0, with_ref=False, **more):
    """One row for each sequence, `left` places of junk before and up to `width` after."""
    width = width or left + max((len(s) for s in batch), default=0)
    rows = [[None] * left + [*s] + [None] * (width - left - len(s)) for s in batch]
    return _inputs(rows, width, dtype, with_ref, **more)


def packed(batch, rows_of, /, *, dtype=torch.float64, gap=0, with_ref=False, **more):
    """`rows_of`: for each row the numbers of the sequences in it, in order, `gap` places between."""
    rows, ids = [], []
    for numbers in rows_of:
        row, row_ids = [], []
        for number in numbers:
            row += [*batch[number], *[None] * gap]
            row_ids += [number * 3] * len(batch[number]) + [-1] * gap
        rows.append(row)
        ids.append(row_ids)
    width = max((len(row) for row in rows), default=0)
    rows = [row + [None] * (width - len(row)) for row in rows]
    ids = [row + [-7] * (width - len(row)) for row in ids]
    sequence_ids = torch.tensor(ids, dtype=torch.int64).reshape(len(rows), width)
    return _inputs(rows, width, dtype, with_ref, sequence_ids=sequence_ids, **more)


def _inputs(rows, width, dtype, with_ref, **more):
    names = dict(COLUMNS, **({"lp_ref": "ref"} if with_ref else {}))
    columns = {
        name: torch.tensor(
            [[JUNK if t is None else getattr(t, field) for t in row] for row in rows], dtype=dtype
        ).reshape(len(rows), width)
        for name, field in names.items()
    }
    mask = torch.tensor([[t is not None and t.is_response for t in row] for row in rows])
    columns["lp_new"].requires_grad_()
    return LossInputs(mask=mask.reshape(len(rows), width).bool(), **columns, **more)


def per_sequence(batch, tensor, *, left=0):
    """Values of padded rows as lists, one for each sequence."""
    return [tensor[row, left : left + len(sequence)].tolist() for row, sequence in enumerate(batch)]


def log_tokens(rows):
    """Tokens from (p_new, p_old, p_infer, advantage)."""
    return [Token(*(math.log(p) for p in row[:3]), row[3]) for row in rows]
