"""The server's settings: one frozen tree around the engine's."""

import ipaddress
from typing import Annotated, Literal, Self

from msgspec import Meta, Struct

from ..engine.config import EngineConfig, JournalConfig, RestartConfig
from ..engine.errors import ConfigError
from ..engine.rollout import LogprobsMode

# what asks for http.api_key, and what for http.admin_key
PROTECTED = ("/v1/", "/rollouts/")
ADMIN = "/weights/"


class HttpConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and to whom it answers."""

    host: Annotated[str, Meta(description="address; beyond this machine it needs an API key")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Meta(ge=0, le=65535, description="port; 0 = any free one")] = 8000
    api_key: Annotated[str, Meta(min_length=1, description="key that /v1 asks for")] | None = None
    admin_key: (
        Annotated[
            str,
            Meta(
                min_length=1,
                description="key that /weights asks for; without one it is served to this machine "
                "only",
            ),
        ]
        | None
    ) = None
    allowed_origins: Annotated[
        tuple[str, ...],
        Meta(
            description="web pages that may call from a browser, such as https://chat.example.org; "
            "* = any"
        ),
    ] = ()
    max_body_bytes: Annotated[int, Meta(ge=1024, description="largest request; beyond it: 413")] = (
        64 * 2**20
    )
    heartbeat_s: Annotated[
        float, Meta(gt=0, description="a silent stream sends a comment this often")
    ] = 15.0

    def is_guarded(self, path: str) -> bool:
        """Whether a key is asked for there, or there is nothing to guard."""
        if (path + "/").startswith(ADMIN):
            return self.admin_key is not None
        return self.api_key is not None or not (path + "/").startswith(PROTECTED)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it. Names other than localhost count as outside."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


class OpenAIConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How /v1 answers."""

    served_model_name: Annotated[
        tuple[str, ...], Meta(description="names of the model on the wire; default: its path")
    ] = ()
    logprobs_mode: Annotated[
        LogprobsMode,
        Meta(description="what logprobs are: raw = T 1, no processors; temp; sampled"),
    ] = "raw"
    chat_template: (
        Annotated[str, Meta(description="a Jinja template, or the name of one of the checkpoint's")]
        | None
    ) = None
    reasoning: Annotated[
        Literal["auto", "always", "off"],
        Meta(description="auto: as the prompt ends; always: output begins in reasoning; off: raw"),
    ] = "auto"
    max_choices: Annotated[int, Meta(ge=1, description="prompts × n of one request")] = 4096


class ServeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that `everstep serve` needs."""

    engine: EngineConfig = EngineConfig()
    http: HttpConfig = HttpConfig()
    openai: OpenAIConfig = OpenAIConfig()
    journal: JournalConfig = JournalConfig()
    restart: RestartConfig = RestartConfig()
    skip_tokenizer_init: Annotated[
        bool, Meta(description="token ids in and out only; no tokenizer is loaded")
    ] = False

    def check(self) -> Self:
        """Return self, or raise ConfigError: open to the network, a key is required."""
        if not self.http.is_loopback and self.http.api_key is None:
            raise ConfigError(
                f"http.host {self.http.host!r} can be reached from outside this machine: "
                "set http.api_key (--api-key), or use 127.0.0.1"
            )
        if self.http.admin_key is not None and self.http.admin_key == self.http.api_key:
            raise ConfigError("http.admin_key is http.api_key: give the admin calls another one")
        return self

    @property
    def model_names(self) -> tuple[str, ...]:
        """What `model` may be in a request; the first is the one in replies."""
        return self.openai.served_model_name or (self.engine.model.path,)
