"""The manifest of a checkpoint folder: what a trainer writes beside the tensors it publishes."""

from collections.abc import Sequence

from .checkpoint import Checkpoint
from .manifest import Canary, Manifest, TensorRecord, combine_digests


def manifest_of(
    checkpoint: Checkpoint,
    *,
    version: int,
    parent: str | None = None,
    lineage: str = "",
    canaries: Sequence[Canary] = (),
) -> Manifest:
    """Reads every tensor once. Raises CheckpointError."""
    records = {
        name: TensorRecord(entry.dtype, entry.shape, checkpoint.tensor_digest(name))
        for name, entry in checkpoint.entries.items()
    }
    quant = checkpoint.config.quant
    return Manifest(
        version=version,
        digest=combine_digests({name: record.digest for name, record in records.items()}),
        parent=parent,
        lineage=lineage,
        weights="plain" if quant is None else quant.kind,
        tensors=records,
        canaries=list(canaries),
    )
