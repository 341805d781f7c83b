"""What a journal brings back when a manager starts."""

from .. import log
from ..errors import ConfigError, EverstepError
from ..journal.ops import Recovered
from ..messages import Ready
from ..rollout import FinishReason, RolloutState
from ..tokenizer import Tokenizer
from .collector import Collector
from .growth import Growth
from .holdings import Holdings
from .transfer import check_here


def bring_back(
    recovered: Recovered,
    core: Collector,
    holdings: Holdings,
    tokenizer: Tokenizer | None,
    *,
    allow_other_weights: bool,
) -> int:
    """Hold what was live, in the order of acceptance; returns how many go on.

    A rollout whose tokens complete it ends now; one that this model cannot run fails with the
    reason. Raises ConfigError, with nothing changed, where the weights are others than those that
    the live rollouts were accepted under (unless that is allowed).
    """
    info = core.info
    if core.missing is None:
        _check_weights(recovered, info, allow_other_weights=allow_other_weights)
    num_live = 0
    for rollout in recovered.live:
        growth = Growth(rollout, tokenizer)
        holdings.num_live += 1
        holdings.add(growth)
        try:
            check_here(rollout, info)
            reason = growth.rebuild(core.stop_ids(rollout)) if rollout.output_ids else None
        except EverstepError as error:
            detail = f"cannot go on with this model: {error}"
            core.end(growth, RolloutState.FAILED, FinishReason("error", detail=detail))
            continue
        if reason is not None:
            core.end(growth, RolloutState.FINISHED, reason)
        else:
            num_live += 1
    # those that were resumed by name while all are paused are not paused
    holdings.is_all_paused = recovered.is_all_paused
    if recovered.live:
        log.event("journal.recovered", rollouts=len(recovered.live), live=num_live)
    return num_live


def _check_weights(recovered: Recovered, info: Ready, *, allow_other_weights: bool) -> None:
    if recovered.flip is None or not recovered.live or allow_other_weights:
        return
    version, digest = recovered.flip
    if digest == info.digest:
        return
    raise ConfigError(
        f"the journal holds {len(recovered.live)} live rollouts of the weights {digest[:12]} "
        f"(version {version}), this model has {info.digest[:12]} (version {info.version}): serve "
        "that model, name another file with --journal, or let them go on with these weights by "
        "journal.other_weights=continue"
    )
