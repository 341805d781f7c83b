"""manifest.json: what a folder of weights says it is.

A version of the weights is a checkpoint folder with this file in it. The digests tell whether the
bytes are those that were meant; the canaries tell whether they mean what the trainer's do: token
sequences with the trainer's own logprobs, scored by the engine before it lets a version serve.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from ..errors import CheckpointError, WeightsRefused

FORMAT = 1
FILE = "manifest.json"
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=0, le=2**53)]
WeightFormat = Literal["plain", "block", "channel", "tensor"]


class Canary(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sequence that the trainer has scored with the weights of this version.

    ids           prompt and output
    lp            ln p of each of ids[num_prompt:] given those before it; T = 1, no processors
    fingerprints  after each main layer: float32 little-endian, one number per position, the dot
                  product of the residual stream with `signs(hidden)`, over √hidden
    drift         after each main layer: what it does to the trainer's own fingerprints that weights
                  are stored in FP8 (mean distance over positions, over their rms). An engine may
                  be a few times as far away, and no more. None: nothing is known
    numerics      id of the numerics that it was scored under, by a trainer that runs the engine's
                  kernels: an engine of the same id must say the same, to the bit. "": others
    """

    ids: list[Count]
    num_prompt: Annotated[int, Meta(ge=1)]
    lp: list[float]
    fingerprints: list[bytes] | None = None
    drift: list[Annotated[float, Meta(ge=0)]] | None = None
    numerics: str = ""

    def fault(self) -> str | None:
        """What is wrong with it in itself, or None."""
        num = len(self.ids) - self.num_prompt
        if num < 1 or len(self.lp) != num:
            return f"{len(self.lp)} logprobs for {num} output tokens"
        if not all(-1e4 < value <= 1e-3 for value in self.lp):
            return "a logprob is not a number from -10000 to 0"
        sizes = {len(one) for one in self.fingerprints or ()}
        if sizes - {4 * len(self.ids)}:
            return f"a fingerprint is not float32 for each of {len(self.ids)} positions"
        if self.drift is not None and len(self.drift) != len(self.fingerprints or ()):
            return f"{len(self.drift)} drifts for {len(self.fingerprints or ())} fingerprints"
        return None


class TensorRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor as it is stored: safetensors type, shape, sha256 (`tensor_hash`)."""

    dtype: str
    shape: tuple[Count, ...]
    digest: Digest


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One version.

    version  number; it only grows within a lineage
    digest   of all tensors (`combine_digests`)
    parent   digest of the version that it was trained on from
    lineage  which run of numbers it belongs to; a rollback begins a new one
    weights  how linear layers are stored
    tensors  every tensor of the model by name, scales included
    delta    reserved: a later format lists only what differs from the parent
    """

    format: int = FORMAT
    version: Annotated[int, Meta(ge=0, le=2**53)]
    digest: Digest
    parent: Digest | None = None
    lineage: str = ""
    weights: WeightFormat = "plain"
    tensors: dict[str, TensorRecord]
    canaries: list[Canary] = []
    delta: None = None


class Version(Struct, frozen=True, kw_only=True):
    """Weights that serve, served or are to serve.

    number   grows within a lineage
    digest   of all tensors; a number may come again after a rollback, a digest means one thing
    folder   where they can be read (again)
    parent   digest of those that they were trained on from; "": unknown
    lineage  run of numbers that it belongs to; "" until the first rollback, unless the trainer
             names one
    """

    number: int
    digest: str
    folder: str = ""
    parent: str = ""
    lineage: str = ""

    @property
    def words(self) -> str:
        """For messages: number and the digest's beginning."""
        return f"version {self.number} ({self.digest[:12]})"


class _Format(Struct):
    format: int


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, None where it has no such file.

    Raises CheckpointError: unreadable, another format, an unknown or wrong field, a digest that
    does not follow from the tensors', a canary that is wrong in itself.
    """
    path = folder / FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        number = msgspec.json.decode(data, type=_Format).format
        if number != FORMAT:
            raise CheckpointError(
                f"{path}: format {number}, this version of everstep reads {FORMAT}"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path}: {error}") from None
    whole = combine_digests({name: one.digest for name, one in manifest.tensors.items()})
    if whole != manifest.digest:
        raise CheckpointError(
            f"{path}: digest {manifest.digest[:12]} does not follow from those of its tensors, "
            f"{whole[:12]}"
        )
    for index, canary in enumerate(manifest.canaries):
        if (fault := canary.fault()) is not None:
            raise CheckpointError(f"{path}: canaries[{index}]: {fault}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put it in place whole, or leave what was there. Raises CheckpointError."""
    path = folder / FILE
    scratch = path.with_name(f".{FILE}.{os.getpid()}")
    try:
        scratch.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        scratch.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None


def check_layout(
    manifest: Manifest, found: Mapping[str, tuple[str, tuple[int, ...]]], folder: Path
) -> None:
    """Compare names, types and shapes with what the folder holds; raises WeightsRefused naming the
    first tensor that is missing, surplus, or of another type or shape.

    found  name → (safetensors type, shape)
    """
    for name, record in sorted(manifest.tensors.items()):
        if name not in found:
            raise WeightsRefused(f"{folder}: {name} is missing: {FILE} lists it", tensor=name)
        dtype, shape = found[name]
        if dtype != record.dtype:
            raise WeightsRefused(
                f"{folder}: {name} has type {dtype}, {FILE} says {record.dtype}", tensor=name
            )
        if tuple(shape) != record.shape:
            raise WeightsRefused(
                f"{folder}: {name} has shape {list(shape)}, {FILE} says {list(record.shape)}",
                tensor=name,
            )
    for name in sorted(found.keys() - manifest.tensors.keys()):
        raise WeightsRefused(f"{folder}: {name} is not in {FILE}", tensor=name)


def check_digest(manifest: Manifest, name: str, digest: str, folder: Path) -> None:
    """Raise WeightsRefused unless the bytes of this tensor are those that were meant."""
    expected = manifest.tensors[name].digest
    if digest != expected:
        raise WeightsRefused(
            f"{folder}: {name} has the digest {digest[:12]}, {FILE} says {expected[:12]}: its "
            "bytes are not those that were published",
            tensor=name,
        )


def tensor_hash(name: str, dtype: str, shape: Iterable[int]) -> "hashlib._Hash":
    """A tensor's digest that has seen its head, and no values yet: sha256 over `name \\0 type \\0
    d0,d1,… \\0` in UTF-8 (a scalar has an empty shape), then the row-major little-endian bytes."""
    return hashlib.sha256(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())


def combine_digests(digests: Mapping[str, str]) -> str:
    """The digest of a whole model: sha256 (hex) over its tensors' digests in sorted name order.

    Built from the parts so that an update of some tensors need not hash the others again.
    """
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(bytes.fromhex(digests[name]))
    return total.hexdigest()


def signs(width: int) -> Iterable[int]:
    """+1 and −1 for each channel of the residual stream, the same for everybody.

    Channel h takes bit h % 8 (least first) of byte h // 8 of
    blake2b(b"everstep fingerprint 0") ‖ blake2b(b"everstep fingerprint 1") ‖ …; a set bit is −1.
    """
    count = -(-width // 512)
    data = b"".join(hashlib.blake2b(b"everstep fingerprint %d" % i).digest() for i in range(count))
    return [-1 if data[h // 8] >> h % 8 & 1 else 1 for h in range(width)]
