"""A version on every engine of a run, or on none."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.engine.checkpoint.manifest import Version
from everstep.engine.errors import CheckpointError, EngineUnavailable, EverstepError, WeightsRefused
from everstep.engine.messages import Flipped, KVPolicy, StageReport
from everstep.trainer_bridge.run.hosts import Prepared, Served, serve

OLD = Version(number=3, digest="old", folder="/old")
NEW = Version(number=4, digest="new", folder="/new")


class FakeHost:
    """fault: what each call raises. log: shared, in order."""

    def __init__(self, name: str, log: list[str], *, serving: Version = OLD) -> None:
        self.name, self.log, self.serving = name, log, serving
        self.staged: Version | None = None
        self.faults: dict[str, EverstepError] = {}

    async def serves(self, version: Version) -> bool:
        await self._called("serves")
        return self.serving == version

    async def stage(self, version: Version) -> Prepared:
        await self._called("stage")
        self.staged = version
        report = StageReport(
            num_bytes=8, seconds=0.5, busy_seconds=0.1, slices=2, longest_slice_s=0.1
        )
        return Prepared(report, is_back=version.number < self.serving.number)

    async def flip(self, version: Version, kv: KVPolicy) -> Flipped:
        await self._called("flip")
        assert self.staged == version
        self.serving, self.staged = version, None
        return Flipped(
            version=version.number,
            digest=version.digest,
            kv=kv,
            stall_s=0.002,
            flip_s=0.001,
            steps_lost=0.1,
            kept_rollouts=0,
            dropped_tokens=0,
        )

    async def unstage(self) -> None:
        await self._called("unstage")
        self.staged = None

    async def _called(self, what: str) -> None:
        await asyncio.sleep(0)
        if what in self.faults:
            raise self.faults[what]
        self.log.append(f"{self.name} {what}")


def make(*names: str) -> tuple[list[FakeHost], list[str]]:
    log: list[str] = []
    return [FakeHost(name, log) for name in names], log


def give(hosts: Sequence[FakeHost], log: list[str], version: Version = NEW) -> Served:
    async def on_staged() -> None:
        log.append("noted")

    return asyncio.run(serve(hosts, version, "keep", on_staged))


def test_nobody_flips_before_all_have_staged_and_it_is_noted() -> None:
    hosts, log = make("a", "b", "c")
    served = give(hosts, log)
    assert [one.split()[-1] for one in log] == ["serves"] * 3 + ["stage"] * 3 + ["noted"] + [
        "flip"
    ] * 3
    assert served == Served(
        "version 4 serves on 3 of 3 engines: staged in 0.50 s, canaries differ by 0 at most, "
        "stall 2.0 ms",
        {},
    )
    assert all(host.serving == NEW for host in hosts)


@pytest.mark.parametrize(
    "error",
    [
        WeightsRefused("w.1 has the digest 1, manifest.json says 2", tensor="w.1"),
        CheckpointError("/new is no folder: it is not a version of the weights"),
    ],
)
def test_a_refusal_anywhere_changes_nothing_anywhere_and_names_the_engine(
    error: EverstepError,
) -> None:
    hosts, log = make("a", "b", "c")
    hosts[1].faults["stage"] = error
    with pytest.raises(type(error)) as raised:
        give(hosts, log)
    assert str(raised.value) == f"b: {error.args[0].removeprefix('b: ')}"
    assert "\n" not in str(raised.value)
    if isinstance(raised.value, WeightsRefused):
        assert raised.value.tensor == "w.1"
    assert all(host.serving == OLD and host.staged is None for host in hosts)
    assert "noted" not in log
    assert [one for one in log if one.endswith("unstage")] == ["a unstage", "c unstage"]


def test_one_engine_alone_is_not_named() -> None:
    hosts, log = make("a")
    hosts[0].faults["stage"] = WeightsRefused("w.1 is wrong")
    with pytest.raises(WeightsRefused, match=r"^w\.1 is wrong$"):
        give(hosts, log)
    hosts, log = make("a")
    assert give(hosts, log).note.startswith("version 4 serves: staged")


def test_what_serves_already_is_not_given_again() -> None:
    hosts, log = make("a", "b")
    hosts[0].serving = NEW
    assert "on 1 of 2 engines" in give(hosts, log).note
    assert [one for one in log if one.startswith("a")] == ["a serves"]
    log.clear()
    assert give(hosts, log) == Served("", {})
    assert log == ["a serves", "b serves"]


def test_a_version_of_a_new_lineage_is_said_to_be_one() -> None:
    hosts, log = make("a", "b")
    assert "version 2 of a new lineage serves on 2 of 2 engines" in (
        give(hosts, log, Version(number=2, digest="back", folder="/back")).note
    )


@given(
    faults=st.lists(st.sampled_from(["", "serves", "stage", "flip"]), min_size=1, max_size=4),
    refused=st.none() | st.integers(0, 3),
)
def test_who_is_away_is_behind_and_the_rest_agree(faults: list[str], refused: int | None) -> None:
    hosts, log = make(*"abcd"[: len(faults)])
    for host, fault in zip(hosts, faults, strict=True):
        if fault:
            host.faults[fault] = EngineUnavailable("no answer")
    is_refused = False
    if refused is not None and refused < len(hosts) and faults[refused] not in ("serves", "stage"):
        hosts[refused].faults["stage"] = WeightsRefused("wrong")
        is_refused = True
    if is_refused:
        with pytest.raises(WeightsRefused):
            give(hosts, log)
        assert all(host.serving == OLD for host in hosts)
        return
    if all(faults):
        with pytest.raises(EngineUnavailable) as raised:
            give(hosts, log)
        assert all(host.name in str(raised.value) for host in hosts)
        return
    served = give(hosts, log)
    assert set(served.away) == {h.name for h, fault in zip(hosts, faults, strict=True) if fault}
    for host in hosts:
        assert host.serving == (OLD if host.name in served.away else NEW)
