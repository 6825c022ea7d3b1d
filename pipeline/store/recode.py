"""A further encoding of a signal that a shard holds as float32: made from the store, without the teacher.

Encoding starts from float32 whoever computed it, so what comes of the stored numbers is, byte for byte, what would come
of the teacher's. From float16 or int8 it would not be: those are never encoded again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import xxhash

from ..errors import VerificationError
from .records import Catalogue, FileRecord
from .signal import ArraySpec, Signal
from .store import TeacherStore
from .writer import ShardWriter


def recodable(catalogue: Catalogue, shard: int, specs: Iterable[ArraySpec]) -> dict[Signal, FileRecord]:
    """The float32 files of a shard that some of these arrays can be made from, by signal."""
    found = {}
    for signal in dict.fromkeys(spec.signal for spec in specs):
        exact = Signal(signal.name, signal.layer, "float32")
        for spec, *_ in catalogue.stored(exact):
            if shard in catalogue.files[spec.path]:
                found[signal] = catalogue.files[spec.path][shard]
    return found


def recode(store: TeacherStore, writer: ShardWriter, specs: Collection[ArraySpec]) -> set[Signal]:
    """Put what can be made from the store into a shard's writer; the signals that it was put for.

    Raises:
        VerificationError: a float32 file is damaged; it would have been encoded with a good checksum.
    """
    from .reader import read_shard

    catalogue = store.catalogue()
    sources = recodable(catalogue, writer.shard, specs)
    for signal, file in sources.items():
        digest = xxhash.xxh3_128()
        for block in store.files.blocks(file.file):
            digest.update(block)
        if digest.hexdigest() != file.xxh3_128:
            raise VerificationError(
                f"{file.spec.label}, shard {file.shard}: {file.file} does not have the recorded checksum, "
                "so no other encoding can be made from it",
                fix=f"mend it first: kd store repair {store.url}",
            )
        values = read_shard(store.files, store.layout, file, catalogue.allocations[file.shard].entries(file.spec))
        writer.put(signal, np.arange(writer.num_rows), values)
    return set(sources)
