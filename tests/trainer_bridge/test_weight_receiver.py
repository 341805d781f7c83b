"""Versions over real sockets: cut links, strangers, spoilt bytes, no room, who is missing."""

import asyncio
import mmap
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from everstep.engine.checkpoint.make_checkpoint import make_checkpoint
from everstep.engine.checkpoint.manifest import Manifest
from everstep.engine.errors import BridgeError, ConfigError, PeerMissing, PeerRefused
from everstep.trainer_bridge.curve import Keys, make_keys, read_keys
from everstep.trainer_bridge.protocol import encode
from everstep.trainer_bridge.weights import arrival as weight_arrival
from everstep.trainer_bridge.weights import chunks as weight_chunks
from everstep.trainer_bridge.weights import folder as weight_folder
from everstep.trainer_bridge.weights import link as weight_link
from everstep.trainer_bridge.weights import receiver as weight_receiver
from everstep.trainer_bridge.weights.protocol import WeightsHello
from everstep.trainer_bridge.weights.receiver import Settings, WeightReceiver
from everstep.trainer_bridge.weights.targets import Elsewhere

from ..proxy import Proxy
from .memory import memory_folder
from .weight_runs import files_of, names_of, sending, taking


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "source", format="f32")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces so small that a tiny model has many of them."""
    size = 4096
    monkeypatch.setattr(weight_chunks, "CHUNK_BYTES", size)
    monkeypatch.setattr(weight_receiver, "_LEAST_WINDOW", 4 * size)
    return size


@contextmanager
def proxied(endpoint: str, **options: Any) -> Iterator[tuple[Proxy, str]]:
    """A proxy on a loop of its own thread, and its address."""
    proxy = Proxy(int(endpoint.rpartition(":")[2]), **options)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(make: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(make(), loop).result(10)

    server = call(lambda: asyncio.start_server(proxy.serve, "127.0.0.1", 0))
    try:
        yield proxy, f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        call(lambda: _close(server))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _close(server: asyncio.Server) -> None:
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
def test_versions_are_those_that_are_written_here(kind: str, source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    bind = "tcp://127.0.0.1:0" if kind == "tcp" else f"ipc://{tmp_path}/socket"
    with (
        taking(there, endpoint=bind) as endpoint,
        sending(source, [endpoint], tmp_path / "here") as (sender, here),
    ):
        assert here is not None
        for version in (1, 2, 3):
            arrived, written = sender.publish(version), here.publish(version)
            assert arrived.digest == written.digest
            assert Path(arrived.path) == there / f"v{version}"
            assert files_of(Path(arrived.path)) == files_of(Path(written.path))
        assert names_of(there) == ["v2", "v3"]


def test_two_receivers_must_name_one_folder(source: Path, tmp_path: Path) -> None:
    with (
        taking(tmp_path / "one") as first,
        taking(tmp_path / "two", endpoint=f"ipc://{tmp_path}/socket") as second,
        sending(source, [first, second]) as (sender, _),
        pytest.raises(
            BridgeError, match=r"must be in the same folder on every host: tcp:.*; start"
        ),
    ):
        sender.publish(1)
    assert files_of(tmp_path / "one" / "v1") == files_of(tmp_path / "two" / "v1")


def test_a_cut_link_goes_on_where_it_was(source: Path, tmp_path: Path, small: int) -> None:
    draw = random.Random(3)
    with (
        taking(tmp_path / "there") as endpoint,
        proxied(endpoint, cut_up_after=lambda: draw.randint(2 * small, 40 * small)) as (proxy, url),
        sending(source, [url], tmp_path / "here") as (sender, here),
    ):
        assert here is not None
        sender.publish(1)
        assert proxy.num_cuts >= 3
        here.publish(1)
    assert files_of(tmp_path / "there" / "v1") == files_of(tmp_path / "here" / "v1")


def test_spoilt_bytes_are_sent_again(
    source: Path, tmp_path: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, small, times=1)
    with (
        taking(tmp_path / "there") as endpoint,
        sending(source, [endpoint], tmp_path / "here") as (sender, here),
    ):
        assert here is not None
        sender.publish(1)
        here.publish(1)
    assert files_of(tmp_path / "there" / "v1") == files_of(tmp_path / "here" / "v1")


def test_spoilt_bytes_over_an_older_version_are_sent_again(
    source: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over: list[bool] = []
    real = weight_arrival.piece_crc

    def noting(spans: list[int], data: memoryview, to: mmap.mmap | None = None) -> int:
        is_over.append(to is not None)
        return real(spans, data, to)

    monkeypatch.setattr(weight_arrival, "piece_crc", noting)
    with (
        memory_folder() as root,
        taking(root / "there") as endpoint,
        sending(source, [endpoint], root / "here", keep=1) as (sender, here),
    ):
        assert here is not None
        sender.publish(1)
        sender.publish(2)
        assert not any(is_over)
        spoil(monkeypatch, small, times=1)
        sender.publish(3)
        assert any(is_over)
        # the second attempt has other memory
        assert not is_over[-1]
        for version in (1, 2, 3):
            here.publish(version)
        assert files_of(root / "there" / "v3") == files_of(root / "here" / "v3")


def test_bytes_that_are_spoilt_again_and_again_are_named(
    source: Path, tmp_path: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with taking(tmp_path) as endpoint, sending(source, [endpoint]) as (sender, _):
        sender.publish(1)
        with monkeypatch.context() as patch:
            spoil(patch, small, times=10**9)
            with pytest.raises(
                BridgeError,
                match=r"version 2 up: a piece of rank 0 with \S+ has the checksum",
            ) as found:
                sender.publish(2)
        assert "\n" not in str(found.value)
        assert names_of(tmp_path) == ["v1"]
        sender.publish(3)


def spoil(monkeypatch: pytest.MonkeyPatch, small: int, *, times: int) -> None:
    """The bytes of piece 7 are exchanged for those of another place, after they were summed."""
    real, left = weight_link.WeightLink.send, [times]

    def spoilt(link: Any, chunk: Any) -> None:
        data = chunk.data
        if left[0] and len(data) == small:
            left[0] -= 1
            half = small // 2
            data[:half], data[half:] = bytes(data[half:]), bytes(data[:half])
        real(link, chunk)

    monkeypatch.setattr(weight_link.WeightLink, "send", spoilt)


def test_no_room_is_said_with_the_figures(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with taking(tmp_path) as endpoint, sending(source, [endpoint]) as (sender, _):
        sender.publish(1)
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        with monkeypatch.context() as patch:
            patch.setattr(weight_folder.shutil, "disk_usage", lambda _: usage)
            with pytest.raises(
                BridgeError, match=r"gives version 2 up: .*v2: a version takes 0\.0"
            ):
                sender.publish(2)
        assert names_of(tmp_path) == ["v1"]
        sender.publish(3)


def test_a_disk_that_fills_up_on_the_way_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with taking(tmp_path) as endpoint, sending(source, [endpoint]) as (sender, _):
        monkeypatch.setattr(weight_folder.os, "pwrite", full)
        with pytest.raises(BridgeError, match=r"gives version 1 up: .*v1: No space left on device"):
            sender.publish(1)
        assert not names_of(tmp_path)


def test_garbage_disturbs_nobody(source: Path, tmp_path: Path) -> None:
    receiver = WeightReceiver(tmp_path, run="run", endpoint="tcp://127.0.0.1:0")
    draw = random.Random(3)
    hello = encode(WeightsHello(protocol=1, software="", run="run", lineage="b", rank=0, world=1))
    with weight_receiver.receiving(receiver) as endpoint, zmq.Context() as context:
        stranger = context.socket(zmq.DEALER)
        stranger.connect(endpoint)
        with sending(source, [endpoint]) as (sender, _):
            for version in (1, 2):
                stranger.send(draw.randbytes(50))
                stranger.send(hello[: draw.randint(0, len(hello) - 1)])
                stranger.send_multipart([b"", b"", hello])
                stranger.send_multipart([encode(_piece(version)), b"bytes"])
                stranger.send(encode(_piece(version)))
                sender.publish(version)
        assert receiver.num_refused >= 8
        stranger.close(0)
    assert names_of(tmp_path) == ["v1", "v2"]


def _piece(version: int) -> weight_link.Piece:
    return weight_link.Piece(version, 0, 0, [0, 5], 0)


def test_a_manifest_of_other_bytes_is_refused(source: Path, tmp_path: Path) -> None:
    with taking(tmp_path) as endpoint, sending(source, [endpoint]) as (sender, _):
        real = sender._manifest

        def other(*arguments: Any) -> Manifest:
            manifest = real(*arguments)
            name = "model.norm.weight"
            record = msgspec.structs.replace(manifest.tensors[name], digest="0" * 64)
            return msgspec.structs.replace(manifest, tensors=manifest.tensors | {name: record})

        sender._manifest = other  # type: ignore[method-assign]
        with pytest.raises(BridgeError, match=r"model\.norm\.weight arrived with the digest"):
            sender.publish(1)
        assert not names_of(tmp_path)


def test_another_version_is_refused_with_both_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_link, "PROTOCOL_VERSION", 2)
    with (
        taking(tmp_path) as endpoint,
        sending(source, [endpoint]) as (sender, _),
        pytest.raises(PeerRefused, match="speaks bridge protocol 2, this side 1"),
    ):
        sender.publish(1)


def test_another_run_and_an_old_life_are_refused(source: Path, tmp_path: Path) -> None:
    with taking(tmp_path) as endpoint:
        with (
            sending(source, [endpoint], run="other") as (sender, _),
            pytest.raises(PeerRefused, match="takes weights of the run 'run', not 'other'"),
        ):
            sender.publish(1)
        with sending(source, [endpoint], lineage="a") as (sender, _):
            sender.publish(1)
        with sending(source, [endpoint], lineage="b") as (sender, _):
            sender.publish(2)
        with (
            sending(source, [endpoint], lineage="a") as (sender, _),
            pytest.raises(PeerRefused, match="lineage 'a' was replaced by 'b'"),
        ):
            sender.publish(3)


def test_keys(source: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "good")
    make_keys(tmp_path / "other")
    engine, trainer = (read_keys(tmp_path / "good", side) for side in ("engine", "trainer"))
    foreign = read_keys(tmp_path / "other", "trainer")
    with taking(tmp_path / "root", keys=engine) as endpoint:
        with sending(source, [endpoint], keys=trainer) as (sender, _):
            sender.publish(1)
        cases: list[tuple[Keys | None, type[BridgeError], str]] = [
            (Keys(foreign.public, foreign.secret, trainer.peer), PeerRefused, "not accept our key"),
            # it takes somebody else for the receiver; and: no keys at all
            (foreign, PeerMissing, "no receiver of weights answers at"),
            (None, PeerMissing, "no receiver of weights answers at"),
        ]
        for keys, kind, words in cases:
            with (
                sending(source, [endpoint], keys=keys, deadline_s=1.0) as (sender, _),
                pytest.raises(kind, match=words),
            ):
                sender.publish(2)


def test_beyond_this_machine_keys_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--weights-bind: .* can be reached from outside"):
        WeightReceiver(
            tmp_path,
            run="run",
            endpoint="tcp://0.0.0.0:5601",
            settings=Settings("--weights-bind", "--weights-root"),
        )
    with pytest.raises(ConfigError, match=r"publish\.endpoints: .* can be reached from outside"):
        Elsewhere(_Alone(), ["tcp://10.0.0.2:5601"], run="run", lineage="a")  # type: ignore[arg-type]


class _Alone:
    rank, size = 0, 1


def test_two_receivers_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        taking(tmp_path),
        pytest.raises(ConfigError, match=r"give this one another --run-name or --root$"),
        taking(tmp_path, endpoint=f"ipc://{tmp_path}/other"),
    ):
        pass


def test_who_is_not_there_is_named(source: Path) -> None:
    with (
        sending(source, ["tcp://127.0.0.1:9"], deadline_s=0.3) as (sender, _),
        pytest.raises(
            PeerMissing,
            match=r"no receiver of weights answers at tcp://127\.0\.0\.1:9 for \d+ s \(to be known\)",
        ),
    ):
        sender.publish(1)


@pytest.mark.parametrize("few", [0, 10**6])
def test_tensors_are_hashed_while_nothing_comes(
    few: int, source: Path, tmp_path: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = threading.Event()
    digest, send = weight_folder.VersionFolder.digest, weight_link.WeightLink.send

    def noting(folder: Any, tensor: Any) -> str:
        if tensor.span.size:
            hashed.set()
        return digest(folder, tensor)

    def waiting(link: Any, chunk: Any) -> None:
        if chunk.number == 100:
            link.settle(99)
            assert hashed.wait(10)
        send(link, chunk)

    monkeypatch.setattr(weight_receiver, "_FEW_CORES", few)
    monkeypatch.setattr(weight_folder.VersionFolder, "digest", noting)
    monkeypatch.setattr(weight_link.WeightLink, "send", waiting)
    with taking(tmp_path) as endpoint, sending(source, [endpoint]) as (sender, _):
        sender.publish(1)
    assert names_of(tmp_path) == ["v1"]


def test_a_trainer_that_falls_silent_costs_nothing(
    source: Path, tmp_path: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        weight_receiver.log, "event", lambda name, **fields: told.append(f"{name} {fields}")
    )
    with (
        taking(tmp_path, patience_s=0.3) as endpoint,
        sending(source, [endpoint]) as (sender, _),
    ):
        sender.publish(1)
        waits = threading.Event()
        real = weight_link.WeightLink.send

        def send(link: Any, chunk: Any) -> None:
            real(link, chunk)
            if chunk.number == 20:
                waits.wait(1.5)

        monkeypatch.setattr(weight_link.WeightLink, "send", send)
        with pytest.raises(
            BridgeError, match=r"version 2 up: rank 0 of 1 is silent for \d+ s; it has"
        ):
            sender.publish(2)
        assert names_of(tmp_path) == ["v1"]
    assert any(line.startswith("weights.given_up") for line in told)
