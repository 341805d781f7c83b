"""Versions that must not serve: what each is refused for, and that the old one goes on to the bit."""

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from everstep.engine.checkpoint.checkpoint import Checkpoint
from everstep.engine.checkpoint.manifest import FILE, combine_digests, read_manifest, write_manifest
from everstep.engine.checkpoint.manifest_maker import manifest_of
from everstep.engine.messages import Add, Refused, StageReport
from everstep.engine.model import model
from everstep.engine.model.model import KVStore
from everstep.engine.model.rotary import rotary_tables
from everstep.engine.rollout import SamplingParams
from everstep.kernels import QuerySpan

from .flips import CANARY, FlippingCore, describe, make_versions, weights_of

GATE, UP = (f"model.layers.2.mlp.experts.3.{name}_proj.weight" for name in ("gate", "up"))
DENSE = "model.layers.1.attention.dense.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    return {
        name: make_versions(root / name, 2, format=name) for name in ("bf16", "f32", "fp8-block")
    }


def spoiled(folder: Path, tmp_path: Path, change) -> Path:
    """A copy of version 1 whose tensors were changed after its manifest was written."""
    copy = tmp_path / "spoiled"
    shutil.copytree(folder, copy)
    path = copy / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return copy


def described_anew(folder: Path) -> None:
    """As by a sender that spoiled the tensors before it took their digests: only the canaries, which
    are the trainer's, know what was meant."""
    meant = read_manifest(folder)
    found = manifest_of(Checkpoint.open(folder), version=1, canaries=meant.canaries)
    write_manifest(folder, found)


def swap_gate_and_up(tensors):
    tensors[GATE], tensors[UP] = tensors[UP], tensors[GATE]


def transpose(tensors):
    tensors[DENSE] = tensors[DENSE].t()


def transpose_in_place(tensors):
    """As many bytes under the old shape: a shard that was sent by columns."""
    tensors[DENSE] = tensors[DENSE].t().reshape(tensors[DENSE].shape)


def halve_norm(tensors):
    tensors[NORM] = tensors[NORM] * 0.5


def poison(tensors):
    tensors[UP][3, 5] = torch.nan


def drop(tensors):
    del tensors[UP]


def refusal(folders, bad: Path) -> Refused:
    """What version 1 is refused for; what serves gives the tokens that it gives undisturbed."""
    add = Add(
        rollout_id="a", prompt_ids=[5, 6, 7], sampling=SamplingParams(), seed=3, max_tokens=12
    )
    alone = FlippingCore(folders)
    alone.add(add)
    alone.finish()
    core = FlippingCore(folders)
    core.add(add)
    core.step(4)
    found = core.stage(1, bad)
    assert isinstance(found, Refused), found
    core.step(2)
    core.finish()
    assert core.rollouts["a"] == alone.rollouts["a"]
    # nor does it stand in the way of one that is good
    assert isinstance(core.stage(1, folders[1]), StageReport)
    return found


@pytest.mark.parametrize("change", [swap_gate_and_up, transpose_in_place, halve_norm])
def test_bytes_that_are_not_those_published_are_refused_by_their_digest(
    originals, tmp_path, change
):
    folders = originals["bf16"]
    found = refusal(folders, spoiled(folders[1], tmp_path, change))
    first = {swap_gate_and_up: GATE, transpose_in_place: DENSE, halve_norm: NORM}[change]
    assert found.tensor == first
    assert "its bytes are not those that were published" in found.message


@pytest.mark.parametrize(
    ("change", "tensor", "says"),
    [
        (transpose, DENSE, "has shape"),
        (drop, UP, "missing"),
        (poison, UP, "not finite"),
    ],
)
def test_what_the_layout_or_a_value_shows_names_the_tensor(
    originals, tmp_path, change, tensor, says
):
    folders = originals["bf16"]
    found = refusal(folders, spoiled(folders[1], tmp_path, change))
    assert tensor in found.message
    assert says in found.message


def test_a_layout_that_is_not_the_manifests_names_the_tensor(originals, tmp_path):
    folders = originals["bf16"]
    for name, change, says in (
        (UP, lambda t: t.pop(UP), f"{UP} is not in manifest.json"),
        (UP, lambda t: t.update({UP: msgspec.structs.replace(t[UP], dtype="F32")}), "type BF16"),
        (UP, lambda t: t.update({UP: msgspec.structs.replace(t[UP], shape=(1, 2))}), "shape"),
        ("extra", lambda t: t.update(extra=t[UP]), "extra is missing"),
    ):
        copy = tmp_path / says.replace(" ", "-")[-12:]
        shutil.copytree(folders[1], copy)
        manifest = read_manifest(copy)
        change(manifest.tensors)
        digests = {name: one.digest for name, one in manifest.tensors.items()}
        write_manifest(copy, msgspec.structs.replace(manifest, digest=combine_digests(digests)))
        core = FlippingCore(folders)
        found = core.stage(1, copy)
        assert isinstance(found, Refused)
        assert found.tensor == name
        assert says in found.message


def test_a_dropped_scale_is_refused(originals, tmp_path):
    folders = originals["fp8-block"]
    scale = f"{UP}_scale_inv"

    def drop_scale(tensors):
        del tensors[scale]

    assert f"missing {scale}" in refusal(folders, spoiled(folders[1], tmp_path, drop_scale)).message


def test_a_file_that_was_cut_is_refused(originals, tmp_path):
    folders = originals["bf16"]
    copy = tmp_path / "cut"
    shutil.copytree(folders[1], copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "is truncated" in refusal(folders, copy).message


@pytest.mark.parametrize("format", ["bf16", "f32"])
@pytest.mark.parametrize(
    ("change", "layer"), [(swap_gate_and_up, 2), (transpose_in_place, 1), (halve_norm, 4)]
)
def test_what_only_the_canaries_know_names_the_first_layer_that_differs(
    originals, tmp_path, format, change, layer
):
    """The digests are of the wrong weights; the trainer has the engine's numerics."""
    folders = originals[format]
    bad = spoiled(folders[1], tmp_path, change)
    described_anew(bad)
    found = refusal(folders, bad)
    assert (found.layer, found.tensor) == (layer, None)
    assert "canaries: logprobs differ from the trainer's by" in found.message


@pytest.mark.parametrize("format", ["bf16", "f32", "fp8-block"])
def test_a_trainer_with_other_numerics_is_held_to_the_bounds_of_the_format(
    originals, tmp_path, format
):
    folders = originals[format]

    def forget_numerics(folder):
        manifest = read_manifest(folder)
        canaries = [msgspec.structs.replace(one, numerics="") for one in manifest.canaries]
        write_manifest(folder, msgspec.structs.replace(manifest, canaries=canaries))

    good = tmp_path / "good"
    shutil.copytree(folders[1], good)
    forget_numerics(good)
    report = FlippingCore(folders).stage(1, good)
    assert isinstance(report, StageReport), report
    assert report.max_bound > report.max_delta == 0.0

    def transposed(tensors):
        stored = tensors[DENSE].view(torch.uint8) if format == "fp8-block" else tensors[DENSE]
        shape = tensors[DENSE].shape
        tensors[DENSE] = stored.t().reshape(shape).contiguous().view(tensors[DENSE].dtype)

    bad = spoiled(folders[1], tmp_path, transposed)
    described_anew(bad)
    forget_numerics(bad)
    assert refusal(folders, bad).layer == 1


def share_reached(weights, ids):
    """Of the routed experts, by a plain forward pass over all tokens at once."""
    config = weights.config
    store = KVStore.empty(config, 64, weights.dtype)
    plan = model.plan_step(config, [QuerySpan(0, 0, len(ids), [1, 2, 3])], 16)
    tables = rotary_tables(config, len(ids), torch.float32)
    found = model.forward(weights, torch.tensor(ids), store, plan, tables)
    reached = [len(set(routes.ids.reshape(-1).tolist())) for routes in found.routes]
    return sum(reached) / (len(reached) * config.num_experts)


def test_a_good_version_says_what_its_canaries_saw(originals):
    core = FlippingCore(originals["bf16"])
    report = core.stage(1)
    assert isinstance(report, StageReport)
    assert (report.canary_tokens, report.max_delta, report.max_bound) == (8, 0.0, 0.0)
    assert report.experts_reached == share_reached(weights_of(originals["bf16"][1]), CANARY)
    assert 0 < report.longest_slice_s <= report.busy_seconds <= report.seconds
    assert report.slices >= 1


def test_without_fingerprints_no_layer_is_named(originals, tmp_path):
    folders = originals["bf16"]
    bad = spoiled(folders[1], tmp_path, lambda tensors: None)
    describe(bad, 1, fingerprints=False)
    path = bad / "model.safetensors"
    tensors = load_file(path)
    swap_gate_and_up(tensors)
    save_file(tensors, path)
    described_anew(bad)
    found = refusal(folders, bad)
    assert (found.layer, found.tensor) == (None, None)
    assert "canaries" in found.message


def test_memory_that_does_not_fit_is_refused_with_the_figure(originals):
    folders = originals["bf16"]
    core = FlippingCore(folders)
    core.free_bytes = 1_000_000
    found = core.stage(1)
    assert isinstance(found, Refused)
    assert "0.00 GB are free" in found.message
    assert "GB beside the weights that serve" in found.message


def test_another_model_is_refused_by_the_key_that_differs(originals, tmp_path):
    copy = tmp_path / "other"
    shutil.copytree(originals["bf16"][1], copy)
    path = copy / "config.json"
    config = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode(config | {"rope_theta": 1e4}))
    found = FlippingCore(originals["bf16"]).stage(1, copy)
    assert isinstance(found, Refused)
    assert "rope_theta is 10000.0, the model that is served has" in found.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 9}, "format 9, this version of everstep reads 1"),
        ({"version": 7}, "manifest.json says version 7, asked for is 1"),
        ({"digest": "0" * 64}, "does not follow from those of its tensors"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"delta": {"base": 1}}, "delta"),
        ({"canaries": [{"ids": [1, 2], "num_prompt": 1, "lp": []}]}, "0 logprobs for 1 output"),
        ({"canaries": [{"ids": [1, 9999], "num_prompt": 1, "lp": [-1.0]}]}, "token id 9999"),
        ({"canaries": [{"ids": [1, 2], "num_prompt": 0, "lp": [-1.0]}]}, "num_prompt"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_in_one_line(originals, tmp_path, change, says):
    copy = tmp_path / "wrong"
    shutil.copytree(originals["bf16"][1], copy)
    manifest = msgspec.json.decode((copy / FILE).read_bytes())
    (copy / FILE).write_bytes(msgspec.json.encode(manifest | change))
    found = FlippingCore(originals["bf16"]).stage(1, copy)
    assert isinstance(found, Refused)
    assert says in found.message
    assert "\n" not in found.message
