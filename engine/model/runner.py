"""From a step's plan to its result: tensors, forward pass, draws.

Shapes: T packed tokens, R rows whose logits are wanted, V vocabulary, L MoE layers, K experts.
"""

import itertools
import math
import traceback
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from ...kernels import StepOutput, explain, log_softmax, top_of
from .. import log
from ..config import ModelConfig, ResolvedKV
from ..core.plan import Draws, Row, RowResult, StepPlan, StepResult
from ..rollout import SamplingParams
from . import model
from .drawing import Drawer, columns_of, sampled_of
from .model import KVStore
from .numerics import numerics_id
from .rotary import rotary_tables
from .step import ForwardPass
from .weights import Weights

# rows of prompt logits in memory at once
PROMPT_ROWS = 64
# by index of the row, those that do more or less than draw one token
Outcomes = defaultdict[int, RowResult]


class ModelRunner:
    """Owns the KV tensors, the parked KV and the live weights of a core."""

    def __init__(self, weights: Weights, kv: ResolvedKV, config: ModelConfig) -> None:
        self.weights = weights
        self._kv = kv
        self._store = KVStore.empty(weights.config, kv.num_blocks * kv.block_size, weights.dtype)
        self._rope_tables = config.rope_tables
        table_dtype = weights.dtype if config.rope_tables == "model" else torch.float32
        self.tables = rotary_tables(weights.config, kv.max_model_len, table_dtype)
        self.forward = self.forward_of(weights)
        self._drawer = Drawer()
        self._parked: dict[str, list[torch.Tensor]] = {}

    def forward_of(self, weights: Weights) -> ForwardPass:
        """Steps of these weights over this runner's KV; nothing is changed by making it."""
        return ForwardPass(weights, self._store, self.tables, self._kv.block_size)

    def flip(self, weights: Weights, forward: ForwardPass) -> None:
        """Run these from the next step on; `forward` is of `forward_of`, their config is the same."""
        assert weights.config == self.weights.config
        forward.replace(self.forward)
        self.weights, self.forward = weights, forward

    @property
    def numerics(self) -> str:
        """What promises equal bits: device class, kernel level, library, dtypes."""
        return numerics_id(self.weights.dtype, self.weights.formats, self._rope_tables)

    @property
    def kernels(self) -> dict[str, str]:
        """What was picked for each operation, and why, for `doctor`."""
        return explain()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run one small step, so that every matrix shape is probed before the first request."""
        tokens = min(self._kv.block_size, self._kv.max_model_len - 1)
        row = Row(
            rollout_id="",
            all_ids=[0] * tokens,
            num_missing=tokens,
            num_tokens=tokens,
            block_table=[1],
            num_prompt=tokens,
            sampling=SamplingParams(),
            seed=0,
            banned_ids=[],
        )
        self._run_rows([row], 0)
        for tensor in self._tensors():
            tensor[self._slots([1])] = 0

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Carry out a plan: parks, unparks, copies, then the rows."""
        self._move_blocks(plan)
        try:
            return self._run_rows(plan.rows, plan.step)
        except Exception:
            # a row has the same bits alone, so that only those pay that cannot be run
            results = [self._run_alone(row, plan.step) for row in plan.rows]
            return StepResult.of(self.weights.version, self.weights.digest, results)

    def _run_alone(self, row: Row, step: int) -> RowResult:
        try:
            return self._run_rows([row], step).outcome(0)
        except Exception as error:
            text = traceback.format_exc()
            log.event("row.failed", level="error", rollout=row.rollout_id, traceback=text)
            return RowResult(fault=" ".join(f"{type(error).__name__}: {error}".split()))

    def _tensors(self) -> list[torch.Tensor]:
        return [*self._store.keys, *self._store.values]

    def _move_blocks(self, plan: StepPlan) -> None:
        for park in plan.parks:
            slots = self._slots(park.blocks)
            self._parked[park.key] = [tensor[slots] for tensor in self._tensors()]
        for key in plan.unpark_drops:
            self._parked.pop(key, None)
        for unpark in plan.unparks:
            slots = self._slots(unpark.blocks)
            for tensor, saved in zip(self._tensors(), self._parked.pop(unpark.key), strict=True):
                tensor[slots] = saved
        if plan.copies:
            source = self._slots([copy.source for copy in plan.copies])
            target = self._slots([copy.target for copy in plan.copies])
            for tensor in self._tensors():
                tensor[target] = tensor[source]

    def _slots(self, blocks: Sequence[int]) -> torch.Tensor:
        size = self._kv.block_size
        first = torch.tensor(blocks, dtype=torch.int64) * size
        return (first.unsqueeze(1) + torch.arange(size)).reshape(-1)

    def _run_rows(self, rows: Sequence[Row], step: int) -> StepResult:
        outcomes: Outcomes = defaultdict(RowResult)
        draws = Draws(token_ids=[], lp_sampled=[], lp_temp=[], kept_mass=[], flags=[])
        if rows:
            wants_routes = any("routing" in row.sampling.record for row in rows)
            out = self.forward.run(rows, wants_routes=wants_routes)
            if out.bad_tokens:
                self._name_bad_layers(rows, out.bad_tokens, outcomes, step)
            self._record(rows, out, outcomes, step)
            draws = self._draw(rows, out, outcomes, step)
        return StepResult(
            version=self.weights.version,
            digest=self.weights.digest,
            draws=draws,
            rows=dict(outcomes),
        )

    def _name_bad_layers(
        self, rows: Sequence[Row], bad_tokens: list[int], outcomes: Outcomes, step: int
    ) -> None:
        """Rows with a value that is not finite, and the layer where it first appears.

        A bad value stays in the residual stream to the end, so the last hidden state tells;
        only then the step is run again to find the layer.
        """
        first_layer = self.forward.first_bad_layer(rows)
        is_bad, first = set(bad_tokens), 0
        for index, row in enumerate(rows):
            tokens = [t for t in range(first, first + row.num_tokens) if t in is_bad]
            if tokens:
                layer = min(first_layer.get(t, len(self.weights.layers)) for t in tokens)
                outcomes[index].nonfinite = f"step {step}, layer {layer}"
            first += row.num_tokens

    def _record(self, rows: Sequence[Row], out: StepOutput, outcomes: Outcomes, step: int) -> None:
        """What rows ask for beside their draws: prompt logprobs and routing."""
        asking = [
            index
            for index, row in enumerate(rows)
            if row.sampling.prompt_logprobs is not None or row.sampling.record
        ]
        if not asking:
            return
        ends = list(itertools.accumulate(row.num_tokens for row in rows))
        for index in asking:
            row, result = rows[index], outcomes[index]
            first = ends[index] - row.num_tokens
            if result.nonfinite is None:
                self._record_prompt(row, first, out, result, step)
            if result.nonfinite is None and "routing" in row.sampling.record:
                self._record_routing(row, first, out, result)

    def _record_prompt(
        self, row: Row, first: int, out: StepOutput, result: RowResult, step: int
    ) -> None:
        """lp_raw of the prompt tokens that this row's tokens, packed from `first` on, predict."""
        count = row.sampling.prompt_logprobs
        last = min(row.start + row.num_tokens, row.num_prompt - 1)
        if count is None or row.start >= last:
            return
        for start in range(row.start, last, PROMPT_ROWS):
            end = min(start + PROMPT_ROWS, last)
            at = first + start - row.start
            lp = log_softmax(model.logits(self.weights, out.hidden[at : at + end - start]))
            targets = torch.tensor(row.all_ids[start + 1 : end + 1])
            result.prompt_lp += lp.gather(1, targets.unsqueeze(1))[:, 0].tolist()
            if count:
                result.prompt_top += [top_of(one, count) for one in lp]
        if not all(map(math.isfinite, result.prompt_lp)):
            result.nonfinite = f"step {step}, layer {len(self.weights.layers)} (head)"

    def _record_routing(self, row: Row, first: int, out: StepOutput, result: RowResult) -> None:
        """Expert ids and weights of this row's tokens, (tokens, L, K)."""
        if out.routes is None:
            return
        part = slice(first, first + row.num_tokens)
        ids, weights = (routes[:, part].transpose(0, 1).numpy() for routes in out.routes)
        width = np.uint8 if self.weights.config.num_experts <= 256 else np.uint16
        result.routing_ids = ids.astype(width).tobytes()
        result.routing_weights = weights.astype(np.float32).tobytes()

    def _draw(self, rows: Sequence[Row], out: StepOutput, outcomes: Outcomes, step: int) -> Draws:
        """Draw a token for every row that ends at its newest one."""
        drawn = [index for index, row in enumerate(rows) if row.num_tokens == row.num_missing]
        head = len(self.weights.layers)
        for place in out.bad_logits:
            result = outcomes[drawn[place]]
            result.nonfinite = result.nonfinite or f"step {step}, layer {head} (head)"
        places: Sequence[int] = range(len(drawn))
        if outcomes:
            places = [n for n, i in enumerate(drawn) if not (i in outcomes and outcomes[i].is_bad)]
            drawn = [drawn[n] for n in places]
        for index in set(range(len(rows))).difference(drawn):
            outcomes.setdefault(index, RowResult())
        found = self._drawer.draw(out.logits, [rows[i] for i in drawn], places)
        for n in found.is_lost.nonzero()[0].tolist():
            where = f"step {step}, layer {head} (penalties, temperature)"
            outcomes[drawn[n]].nonfinite = where
        for n, more in found.more.items():
            outcomes[drawn[n]].sampled = sampled_of(more)
        draws = columns_of(found, drawn, len(rows))
        for index, result in outcomes.items():
            if rows[index].samples and not result.is_bad and result.sampled is None:
                result.sampled = draws.sampled(index)
        return draws
