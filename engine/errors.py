"""Every error that Everstep raises on purpose.

    EverstepError
    ├── InvalidRequest            400  a parameter is wrong; `field` names it
    │   ├── ContextTooLong        400  prompt and max_tokens do not fit
    │   ├── UnknownModel          404
    │   └── InvalidTrajectory     400  an export that cannot be taken; `field` names the part
    ├── Conflict                  409  it contradicts what is known here
    │   ├── KeyReused             409  an Idempotency-Key with another body
    │   ├── IllegalState          409  the rollout's state does not allow it
    │   ├── StaleVersion          409  weights whose number would run backwards, or of another lineage
    │   └── WeightsRefused        409  weights that do not pass; the old ones go on serving
    ├── UnknownRollout            404
    ├── UnknownBudget             404
    ├── Overloaded                429  a queue is full; `retry_after_s`
    ├── EngineUnavailable         503  not ready
    │   ├── EngineDied            503
    │   └── Draining              503
    ├── JournalError              503  the journal cannot be used; names the file, and the table and row
    │   ├── JournalDamaged        503  a record is not what was written
    │   └── JournalFull           503  no room; nothing of the call was written
    ├── LedgerError               500  tokens of a C3PO++ run are in no account, or in two; names the account
    ├── BridgeError               500  engine and trainer cannot work together; names the peer
    │   ├── PeerMissing           504  nobody answered in time; names who is missing
    │   └── PeerRefused           409  the other side will not have us; its reason
    ├── CheckpointError           400, exit 2  a model folder that cannot be loaded; names the tensor or the key
    ├── ConfigError               exit 2  a setting that cannot be used; names its path
    └── MissingExtra              exit 2  an optional package is not installed; names the extra

A message holds the value, the limit and the next action, on one line.
"""


class EverstepError(Exception):
    """Root of the tree. `code` is the word on the wire, `status` the HTTP status."""

    code = "internal_error"
    status = 500
    retryable = False


class InvalidRequest(EverstepError):
    """A request that can never work as it stands. `field` is the offending parameter."""

    code = "invalid_request_error"
    status = 400

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ContextTooLong(InvalidRequest):
    """The prompt, or prompt plus max_tokens, exceeds the context."""

    code = "context_length_exceeded"


class UnknownModel(InvalidRequest):
    """The request names a model that is not served here."""

    code = "model_not_found"
    status = 404


class InvalidTrajectory(InvalidRequest):
    """An exported rollout that cannot be taken: cut, forged, foreign or of a newer format."""

    code = "invalid_trajectory"


class Conflict(EverstepError):
    """The call contradicts what is known here; the same call will never succeed."""

    code = "conflict"
    status = 409


class KeyReused(Conflict):
    """The Idempotency-Key was used before, with another body."""

    code = "idempotency_key_reused"


class IllegalState(Conflict):
    """The rollout is in a state that does not allow the call."""

    code = "illegal_state"


class StaleVersion(Conflict):
    """Weights older than those that serve, or of another lineage. Numbers never run backwards."""

    code = "stale_version"


class WeightsRefused(Conflict):
    """A version that may not serve: what serves goes on serving.

    tensor  the one at fault, where digests or the layout show it
    layer   the first that differs, where only the canaries do; the number of layers means the head
    """

    code = "weights_refused"

    def __init__(
        self, message: str, *, tensor: str | None = None, layer: int | None = None
    ) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.layer = layer


class UnknownRollout(EverstepError):
    """No rollout has this id."""

    code = "rollout_not_found"
    status = 404


class UnknownBudget(EverstepError):
    """No token budget has this id."""

    code = "budget_not_found"
    status = 404


class Overloaded(EverstepError):
    """A queue is full. Try again after `retry_after_s` seconds."""

    code = "rate_limit_exceeded"
    status = 429
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailable(EverstepError):
    """The engine cannot take work now; the message says why."""

    code = "service_unavailable"
    status = 503
    retryable = True


class EngineDied(EngineUnavailable):
    """A core process ended without being asked to."""


class Draining(EngineUnavailable):
    """The server is going down and takes no new work."""


class JournalError(EverstepError):
    """The journal cannot be used. The message names the file and, where one is bad, the record."""

    code = "journal_error"
    status = 503


class JournalDamaged(JournalError):
    """A record of the journal is not what was written. The message names the table and the row."""


class JournalFull(JournalError):
    """The journal has no room for new rollouts. Nothing was written; the call may be repeated."""

    code = "journal_full"
    retryable = True


class LedgerError(EverstepError):
    """The books of a C3PO++ run do not balance. The message names account and iteration."""

    code = "ledger_error"


class BridgeError(EverstepError):
    """Engine and trainer cannot work together. The message names the peer."""

    code = "bridge_error"


class PeerMissing(BridgeError):
    """Nobody answered before the deadline. The message names who is missing, and for how long."""

    code = "peer_missing"
    status = 504
    retryable = True


class PeerRefused(BridgeError):
    """The other side will not have this one. The message is its reason."""

    code = "peer_refused"
    status = 409


class CheckpointError(EverstepError):
    """A model folder that cannot be loaded. The message names the file, tensor or key."""

    code = "checkpoint_error"
    # of a call that names a folder; a command ends with 2
    status = 400


class ConfigError(EverstepError):
    """A setting that cannot be used. The message names its path and the accepted values."""

    code = "config_error"


class MissingExtra(EverstepError):
    """An optional package is missing. The message names the extra to install."""

    code = "missing_extra"

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}: pip install 'everstep[{extra}]'"
        )
