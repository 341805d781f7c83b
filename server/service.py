"""What the endpoints stand on: one manager, one tokenizer, one configuration."""

import asyncio
from collections.abc import Sequence

from msgspec import Struct

from ..engine.errors import ContextTooLong, InvalidRequest, UnknownModel
from ..engine.manager.manager import RolloutManager
from ..engine.tokenizer import Tokenizer
from .config import ServeConfig

# longer texts are encoded on a thread, so that the event loop goes on
LONG_TEXT = 20_000


class Service(Struct, frozen=True):
    """What the endpoints stand on."""

    manager: RolloutManager
    tokenizer: Tokenizer | None
    config: ServeConfig
    created: int

    def model_name(self, requested: str | None) -> str:
        """The name for the reply; raises UnknownModel."""
        names = self.config.model_names
        if requested is not None and requested not in names:
            raise UnknownModel(
                f"model {requested!r} is not served here; served: {', '.join(names)}", field="model"
            )
        return requested or names[0]

    def check_choices(self, num_prompts: int, n: int) -> None:
        """Raises InvalidRequest before any of them is encoded."""
        most = self.config.openai.max_choices
        if num_prompts * n > most:
            raise InvalidRequest(
                f"{num_prompts} prompts × n = {n} are {num_prompts * n} choices; "
                f"at most {most} are accepted in one request",
                field="n",
            )

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool, is_cut: bool = False
    ) -> list[list[int]]:
        """Token ids of each.

        is_cut  only their last tokens are used, so that they may be longer than the context
        Raises InvalidRequest (ContextTooLong).
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise InvalidRequest(
                "text needs a tokenizer, and this runs without one (skip_tokenizer_init): "
                "send token ids as the prompt",
                field="prompt",
            )

        def encode() -> list[list[int]]:
            return [tokenizer.encode(text, add_special_tokens) for text in texts]

        if sum(map(len, texts)) < LONG_TEXT:
            return encode()
        if not is_cut:
            for text in texts:
                self._check_length(text, tokenizer)
        return await asyncio.to_thread(encode)

    def _check_length(self, text: str, tokenizer: Tokenizer) -> None:
        """Tokens take a hundred times the memory of their text: what cannot fit is not made one."""
        max_model_len, longest = (
            self.manager.known_info.max_model_len,
            tokenizer.longest_token_bytes,
        )
        num_bytes = len(text.encode())
        if longest is not None and num_bytes > max_model_len * longest:
            raise ContextTooLong(
                f"prompt has {num_bytes} bytes; the context holds {max_model_len} tokens, which "
                f"are at most {max_model_len * longest} bytes",
                field="prompt",
            )
