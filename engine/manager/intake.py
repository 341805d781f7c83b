"""What a face asks for, checked once: a submission that passes can run."""

import hashlib
import time
import uuid
from typing import Any

import msgspec
from msgspec import Struct

from ..errors import ContextTooLong, InvalidRequest
from ..messages import Ready
from ..rollout import MAX_SAMPLES, Rollout, SamplingParams, check_prompt, derive_seed

_canonical = msgspec.msgpack.Encoder(order="deterministic").encode


class Accepted(Struct, frozen=True):
    """Durable rollouts that are in the journal now; is_replay: they were, under the same key."""

    group_id: str
    """Of the first."""
    rollout_ids: list[str]
    is_replay: bool = False


class Submission(Struct, kw_only=True):
    """What a face asks for: `samples` rollouts of one prompt."""

    prompt_ids: list[int]
    sampling: SamplingParams = SamplingParams()
    samples: int = 1
    group_id: str | None = None
    priority: int = 0
    """Larger runs first and preempts smaller."""
    client: str = ""
    pool: str = ""
    attempt: int = 0
    """Which try at this sample; with a seed of its own it is another sample."""
    metadata: Any = None

    def check(self, info: Ready, *, eos_ids: tuple[int, ...], has_tokenizer: bool) -> int:
        """The resolved max_tokens; raises InvalidRequest (ContextTooLong) naming the field."""
        if not 1 <= self.samples <= MAX_SAMPLES:
            raise InvalidRequest(
                f"n must be from 1 to {MAX_SAMPLES}, got {self.samples}", field="n"
            )
        sampling = self.sampling.check(vocab_size=info.vocab_size)
        check_prompt(self.prompt_ids, vocab_size=info.vocab_size, max_model_len=info.max_model_len)
        if sampling.stop and not has_tokenizer:
            raise InvalidRequest(
                "stop: strings need a tokenizer, and this engine runs without one; "
                "use stop_token_ids",
                field="stop",
            )
        if sampling.min_tokens and len({*sampling.stop_token_ids, *eos_ids}) >= info.vocab_size:
            raise InvalidRequest(
                "stop_token_ids: with min_tokens at least one id must be left to draw",
                field="stop_token_ids",
            )
        return self._max_tokens(info.max_model_len)

    def _max_tokens(self, max_model_len: int) -> int:
        sampling, room = self.sampling, max_model_len - len(self.prompt_ids)
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise ContextTooLong(
                f"max_tokens: {len(self.prompt_ids)} prompt tokens leave room for {room} of "
                f"the context's {max_model_len}, got {sampling.max_tokens}",
                field="max_tokens",
            )
        max_tokens = sampling.max_tokens or room
        if sampling.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens: at most {max_tokens} tokens fit, got {sampling.min_tokens}",
                field="min_tokens",
            )
        return max_tokens

    def make(self, *source: object, max_tokens: int) -> list[Rollout]:
        """The rollouts, in sample order, before any token exists.

        source  what seeds are derived from where none is given; no two submissions share it
        """
        group_id = self.group_id or new_group_id()
        created_s = time.time()
        return [
            Rollout(
                id=new_rollout_id(),
                group_id=group_id,
                index=index,
                prompt_ids=self.prompt_ids,
                sampling=self.sampling,
                seed=seed_of(self.sampling.seed, self.samples, index, *source),
                max_tokens=max_tokens,
                priority=self.priority,
                client=self.client,
                pool=self.pool,
                attempt=self.attempt,
                metadata=self.metadata,
                created_s=created_s,
            )
            for index in range(self.samples)
        ]


def digest_of(content: Any) -> str:
    """Of submissions, or of other plain values: equal ones give equal digests, in any process."""
    return hashlib.blake2b(_canonical(_with_text_keys(content)), digest_size=16).hexdigest()


def _with_text_keys(content: Any) -> Any:
    """The deterministic encoder sorts keys, which are strings for it."""
    if isinstance(content, list):
        return [_with_text_keys(one) for one in content]
    if not isinstance(content, Submission) or not content.sampling.logit_bias:
        return content
    bias = {str(token_id): value for token_id, value in content.sampling.logit_bias.items()}
    fields = {name: getattr(content, name) for name in content.__struct_fields__}
    sampling = {name: getattr(content.sampling, name) for name in SamplingParams.__struct_fields__}
    return fields | {"sampling": sampling | {"logit_bias": bias}}


def new_rollout_id() -> str:
    return f"ro-{uuid.uuid4().hex}"


def new_group_id() -> str:
    return f"grp-{uuid.uuid4().hex}"


def seed_of(seed: int | None, samples: int, index: int, *source: object) -> int:
    """The seed of sample `index`: two rollouts never share one by accident.

    source  what it is derived from where none is given
    """
    if seed is None:
        return derive_seed(*source, index)
    return seed if samples == 1 else derive_seed("sample", seed, index)
