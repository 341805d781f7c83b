"""From a step's plan to its result: tensors, forward pass, draws.

Shapes: T packed tokens, R rows whose logits are wanted, V vocabulary, L MoE layers, K experts.
"""

import ctypes
import math
import traceback
from collections.abc import Sequence

import numpy as np
import torch

from ..kernels import (
    Draw,
    Rule,
    StepOutput,
    explain,
    level_name,
    log_softmax,
    sample,
    top_of,
)
from . import log, model
from .config import ModelConfig, ResolvedKV
from .model import KVStore
from .plan import Row, RowResult, Sampled, StepPlan, StepResult
from .rollout import SAMPLED, TRUNCATED_SUPPORT, SamplingParams
from .rotary import rotary_tables
from .step import ForwardPass
from .weights import Weights

# changes when the bits of the C++ kernels do
KERNELS_VERSION = 1
# steps of fewer tokens run on one thread: waking a second one for each of some 300 small products
# costs more than it gives (benchmarks/RESULTS.md). Bits do not depend on the number of threads.
FEW_TOKENS = 16
# rows of prompt logits in memory at once
PROMPT_ROWS = 64


class ModelRunner:
    """Owns the KV tensors, the parked KV and the live weights of a core."""

    def __init__(self, weights: Weights, kv: ResolvedKV, config: ModelConfig) -> None:
        self.weights = weights
        self._kv = kv
        self._store = KVStore.empty(weights.config, kv.num_blocks * kv.block_size, weights.dtype)
        table_dtype = weights.dtype if config.rope_tables == "model" else torch.float32
        tables = rotary_tables(weights.config, kv.max_model_len, table_dtype)
        self._forward = ForwardPass(weights, self._store, tables, kv.block_size)
        self._parked: dict[str, list[torch.Tensor]] = {}
        self._num_threads = torch.get_num_threads()

    @property
    def numerics(self) -> str:
        """What promises equal bits: device class, kernel level, library, dtypes."""
        level, torch_part = level_name(), f"torch-{torch.__version__}"
        if level == "torch":
            level = torch.backends.cpu.get_cpu_capability().lower()
        else:
            torch_part = f"everstep-{KERNELS_VERSION}"
        dtype = str(self.weights.dtype).removeprefix("torch.")
        return "/".join(["cpu", torch_part, level, dtype, self.weights.formats])

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
        results: list[RowResult] = []
        is_small = sum(len(row.token_ids) for row in plan.rows) < FEW_TOKENS
        torch.set_num_threads(1 if is_small else self._num_threads)
        try:
            if plan.rows:
                results = self._run_rows(plan.rows, plan.step)
        except Exception:
            # a row has the same bits alone, so that only those pay that cannot be run
            results = [self._run_alone(row, plan.step) for row in plan.rows]
        finally:
            torch.set_num_threads(self._num_threads)
        return StepResult.of(self.weights.version, self.weights.digest, results)

    def _run_alone(self, row: Row, step: int) -> RowResult:
        try:
            [result] = self._run_rows([row], step)
        except Exception as error:
            text = traceback.format_exc()
            log.event("row.failed", level="error", rollout=row.rollout_id, traceback=text)
            result = RowResult(fault=" ".join(f"{type(error).__name__}: {error}".split()))
        return result

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

    def _run_rows(self, rows: list[Row], step: int) -> list[RowResult]:
        wants_routes = any("routing" in row.sampling.record for row in rows)
        out = self._forward.run(rows, wants_routes=wants_routes)
        results = [RowResult() for _ in rows]
        if out.bad_tokens:
            self._name_bad_layers(rows, out.bad_tokens, results, step)
        first = 0
        for row, result in zip(rows, results, strict=True):
            if result.nonfinite is None:
                self._record_prompt(row, first, out, result, step)
                self._record_routing(row, first, out, result)
            first += len(row.token_ids)
        self._draw(rows, out, results, step)
        return results

    def _name_bad_layers(
        self, rows: list[Row], bad_tokens: list[int], results: list[RowResult], step: int
    ) -> None:
        """Rows with a value that is not finite, and the layer where it first appears.

        A bad value stays in the residual stream to the end, so the last hidden state tells;
        only then the step is run again to find the layer.
        """
        first_layer = self._forward.first_bad_layer(rows)
        is_bad, first = set(bad_tokens), 0
        for row, result in zip(rows, results, strict=True):
            tokens = [t for t in range(first, first + len(row.token_ids)) if t in is_bad]
            if tokens:
                layer = min(first_layer.get(t, len(self.weights.layers)) for t in tokens)
                result.nonfinite = f"step {step}, layer {layer}"
            first += len(row.token_ids)

    def _record_prompt(
        self, row: Row, first: int, out: StepOutput, result: RowResult, step: int
    ) -> None:
        """lp_raw of the prompt tokens that this row's tokens, packed from `first` on, predict."""
        count = row.sampling.prompt_logprobs
        last = min(row.start + len(row.token_ids), row.num_prompt - 1)
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
        if "routing" not in row.sampling.record or out.routes is None:
            return
        part = slice(first, first + len(row.token_ids))
        ids, weights = (routes[:, part].transpose(0, 1).numpy() for routes in out.routes)
        width = np.uint8 if self.weights.config.num_experts <= 256 else np.uint16
        result.routing_ids = ids.astype(width).tobytes()
        result.routing_weights = weights.astype(np.float32).tobytes()

    def _draw(self, rows: list[Row], out: StepOutput, results: list[RowResult], step: int) -> None:
        """Draw a token for every row that ends at its newest one."""
        drawn = [i for i, row in enumerate(rows) if row.samples]
        for place in out.bad_logits:
            result = results[drawn[place]]
            where = f"step {step}, layer {len(self.weights.layers)} (head)"
            result.nonfinite = result.nonfinite or where
        good = [n for n, i in enumerate(drawn) if results[i].nonfinite is None]
        if not good:
            return
        values = out.logits if len(good) == len(drawn) else out.logits[torch.tensor(good)]
        draws = sample(values, [rule_of(rows[drawn[n]]) for n in good])
        for n, draw in zip(good, draws, strict=True):
            if draw is None:
                head = len(self.weights.layers)
                results[drawn[n]].nonfinite = f"step {step}, layer {head} (penalties, temperature)"
            else:
                results[drawn[n]].sampled = sampled_of(draw)


def rule_of(row: Row) -> Rule:
    """What the sampler needs to know of one row."""
    p = row.sampling
    counts = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
    return Rule(
        seed=row.seed,
        position=row.position,
        temperature=p.temperature,
        top_p=p.top_p,
        top_k=max(p.top_k, 0),
        min_p=p.min_p,
        presence_penalty=p.presence_penalty,
        frequency_penalty=p.frequency_penalty,
        repetition_penalty=p.repetition_penalty,
        logit_bias=p.logit_bias,
        prompt_ids=row.all_ids[: row.num_prompt] if counts else (),
        output_ids=row.all_ids[row.num_prompt :] if counts else (),
        banned=row.banned_ids if row.position < p.min_tokens else (),
        num_top=p.top_logprobs,
        top_of=p.logprobs_mode,
        wants_raw="lp_raw" in p.record or (p.top_logprobs > 0 and p.logprobs_mode == "raw"),
        wants_entropy="entropy" in p.record,
        wants_kept_ids="kept_ids" in p.record,
    )


def sampled_of(draw: Draw) -> Sampled:
    """A draw in the words of the plan; every value a float32."""
    return Sampled(
        token_id=draw.token_id,
        lp_sampled=float32(draw.lp_sampled),
        lp_temp=float32(draw.lp_temp),
        kept_mass=float32(draw.kept_mass),
        flags=SAMPLED | (TRUNCATED_SUPPORT if draw.is_cut else 0),
        lp_raw=None if draw.lp_raw is None else float32(draw.lp_raw),
        entropy=None if draw.entropy is None else float32(draw.entropy),
        kept_ids=draw.kept_ids,
        top=None if draw.top is None else [(token, float32(lp)) for token, lp in draw.top],
    )


def float32(value: float) -> float:
    """The nearest float32: what is recorded is what any wire or file can hold."""
    return ctypes.c_float(value).value
