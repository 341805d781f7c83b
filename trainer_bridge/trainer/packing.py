"""Sequences end to end: what one forward and backward pass of the trainer takes.

A sequence of n tokens occupies n − 1 rows: its last token is a target and never an input, so that
rows are exactly the positions whose routes an engine records.

Shapes: T packed rows, R rows whose next token is scored, L MoE layers, K experts per token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
# padded lengths of attention are multiples of this share of the power of two above: 1/8
_STEPS_PER_OCTAVE = 8


@dataclass(frozen=True)
class TrainSequence:
    """One prompt with one response, as it is scored.

    ids              (n,) int64, prompt and response; n >= 2
    num_prompt       of them given; at least 1
    temperature      that the response was sampled at, above 0
    mask             (n − num_prompt,) bool: tokens that count; None: all
    kept             per response token the ids that sampling kept, empty where nothing was cut;
                     None: the whole vocabulary
    routing_ids      (n − 1, L, K) int64 to replay; None: the trainer's own choice
    routing_weights  (n − 1, L, K) float32 to replay with them; None: the trainer's own gate values
    """

    ids: Ints
    num_prompt: int
    temperature: float = 1.0
    mask: npt.NDArray[np.bool_] | None = None
    kept: Sequence[Sequence[int]] | None = None
    routing_ids: Ints | None = None
    routing_weights: Floats | None = None

    @property
    def num_rows(self) -> int:
        return len(self.ids) - 1

    @property
    def num_response(self) -> int:
        return len(self.ids) - self.num_prompt


@dataclass(frozen=True)
class KeptIds:
    """Kept ids of R rows, end to end.

    offsets  (R + 1,) int64; an empty list means that nothing was cut
    ids      int64
    """

    offsets: torch.Tensor
    ids: torch.Tensor

    def rows(self, start: int, end: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """(row − start, id) of what rows start … end − 1 keep, each int64."""
        first, last = int(self.offsets[start]), int(self.offsets[end])
        counts = self.offsets[start + 1 : end + 1] - self.offsets[start:end]
        row = torch.repeat_interleave(torch.arange(end - start, device=counts.device), counts)
        return row, self.ids[first:last]


@dataclass(frozen=True)
class Bucket:
    """Sequences that attention pads to one length.

    rows  (n, length) int64: packed rows, those of padding 0
    real  (m,) int64: places of the flattened rows that are no padding
    """

    rows: torch.Tensor
    real: torch.Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Sequences in one pass.

    lengths          rows of each sequence
    ids              (T,) int64
    positions        (T,) int64, from 0 in each sequence
    buckets          for attention
    places           (T,) int64: where a packed row lies in the buckets' real rows, end to end
    wanted           (R,) int64: rows whose next token is scored, ascending
    targets          (R,) int64: those tokens
    temperatures     (R,) float32
    responses        scored places per sequence: (sequence, token of its response), each (R,) int64
    kept             kept ids of each wanted row; None: nothing was cut
    routing_ids      (L, T, K) int64 to replay, or None
    routing_weights  (L, T, K) float32 to replay, or None
    """

    lengths: tuple[int, ...]
    ids: torch.Tensor
    positions: torch.Tensor
    buckets: tuple[Bucket, ...]
    places: torch.Tensor
    wanted: torch.Tensor
    targets: torch.Tensor
    temperatures: torch.Tensor
    responses: tuple[torch.Tensor, torch.Tensor]
    kept: KeptIds | None = None
    routing_ids: torch.Tensor | None = None
    routing_weights: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device) -> "PackedBatch":
        """On a device."""
        if device == self.ids.device:
            return self
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        if self.kept is not None:
            moved["kept"] = KeptIds(self.kept.offsets.to(device), self.kept.ids.to(device))
        buckets = tuple(Bucket(b.rows.to(device), b.real.to(device)) for b in self.buckets)
        owner, token = self.responses
        responses = (owner.to(device), token.to(device))
        return replace(self, buckets=buckets, responses=responses, **moved)


def pack(sequences: Sequence[TrainSequence]) -> PackedBatch:
    """Put the sequences end to end, in their order.

    Raises ValueError where a sequence is too short, or some have routes and others have none.
    """
    for name in ("routing_ids", "routing_weights"):
        if len({getattr(s, name) is None for s in sequences}) > 1:
            raise ValueError(f"some sequences have {name} and others have none")
    if not sequences or any(len(s.ids) < 2 or not s.num_prompt > 0 for s in sequences):
        raise ValueError("a sequence needs a prompt, and two tokens at least")
    lengths = tuple(s.num_rows for s in sequences)
    buckets, places = _bucket(lengths)
    wanted, targets, temperatures, owner, token = [], [], [], [], []
    for n, (s, first) in enumerate(zip(sequences, _starts(lengths), strict=True)):
        scored = np.arange(s.num_response) if s.mask is None else np.flatnonzero(s.mask)
        wanted.append(first + s.num_prompt - 1 + scored)
        targets.append(s.ids[s.num_prompt + scored])
        temperatures.append(np.full(len(scored), s.temperature, dtype=np.float32))
        owner.append(np.full(len(scored), n))
        token.append(scored)
    return PackedBatch(
        lengths=lengths,
        ids=torch.from_numpy(np.concatenate([s.ids[:-1] for s in sequences])),
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        buckets=buckets,
        places=places,
        wanted=torch.from_numpy(np.concatenate(wanted)),
        targets=torch.from_numpy(np.concatenate(targets)),
        temperatures=torch.from_numpy(np.concatenate(temperatures)),
        responses=(
            torch.from_numpy(np.concatenate(owner)),
            torch.from_numpy(np.concatenate(token)),
        ),
        kept=_kept(sequences, token),
        routing_ids=_routes([s.routing_ids for s in sequences]),
        routing_weights=_routes([s.routing_weights for s in sequences]),
    )


def split(rows: Sequence[int], max_rows: int) -> list[list[int]]:
    """Which sequences go together: places into `rows`, first fit by falling length.

    A longer sequence than `max_rows` is alone. The outcome depends on `rows` alone.
    """
    order = sorted(range(len(rows)), key=lambda n: (-rows[n], n))
    groups: list[list[int]] = []
    free: list[int] = []
    for n in order:
        fit = next((g for g, left in enumerate(free) if left >= rows[n]), None)
        if fit is None:
            groups.append([])
            free.append(max_rows)
            fit = len(groups) - 1
        groups[fit].append(n)
        free[fit] -= rows[n]
    return [sorted(group) for group in groups]


def _starts(lengths: Sequence[int]) -> Iterator[int]:
    return accumulate(lengths[:-1], initial=0)


def _bucket(lengths: Sequence[int]) -> tuple[tuple[Bucket, ...], torch.Tensor]:
    members: dict[int, list[tuple[int, int]]] = {}
    for first, length in zip(_starts(lengths), lengths, strict=True):
        step = max(1, (1 << (length - 1).bit_length()) // _STEPS_PER_OCTAVE)
        members.setdefault(-(-length // step) * step, []).append((first, length))
    buckets, packed = [], []
    for padded, spans in sorted(members.items()):
        rows = np.zeros((len(spans), padded), dtype=np.int64)
        is_real = np.zeros((len(spans), padded), dtype=np.bool_)
        for n, (first, length) in enumerate(spans):
            rows[n, :length] = np.arange(first, first + length)
            is_real[n, :length] = True
        real = np.flatnonzero(is_real)
        packed.append(rows.reshape(-1)[real])
        buckets.append(Bucket(torch.from_numpy(rows), torch.from_numpy(real)))
    order = np.concatenate(packed)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return tuple(buckets), torch.from_numpy(places)


def _kept(sequences: Sequence[TrainSequence], scored: Sequence[Ints]) -> KeptIds | None:
    if all(s.kept is None for s in sequences):
        return None
    lists: list[Sequence[int]] = []
    for s, tokens in zip(sequences, scored, strict=True):
        lists += [() if s.kept is None else s.kept[n] for n in tokens]
    offsets = torch.tensor([0, *accumulate(map(len, lists))])
    return KeptIds(offsets, torch.tensor([i for ids in lists for i in ids], dtype=torch.int64))


def _routes(routes: "Sequence[npt.NDArray[np.generic] | None]") -> torch.Tensor | None:
    """(rows, L, K) of each sequence → (L, T, K)."""
    found = [one for one in routes if one is not None]
    if not found:
        return None
    return torch.from_numpy(np.concatenate(found)).transpose(0, 1).contiguous()
