"""What a store keeps of its teacher against the teacher itself: tensors, tokenizer, config, and what they derive.

Checksums show that a sidecar is what was written, not that it is this teacher's; and a proof is a file that says that
somebody tried. Here it is tried again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...pipeline.fingerprint import differing_fields

if TYPE_CHECKING:
    from ...pipeline.store import TeacherStore
    from ..cache_teacher.teacher import Teacher

USED_WITH = {"embeddings": ("embeddings.proof",), "head": ("head.proof", "mlm.proof")}
"""Without one of these beside it, nothing is derived by a sidecar."""


def check_sidecars(store: TeacherStore, teacher: Teacher, *, device: str) -> tuple[list[str], list[str]]:
    """(names of sidecars that were compared, what is wrong with them); those that kd does not use are left out.

    Args:
        teacher: the store's.
        device: where it runs.

    Raises:
        VerificationError: a sidecar is damaged.
    """
    from ..cache_teacher.sidecars import CONFIG, PROOFS, TOKENIZER, is_of_tensors

    names = [name for name in _names(store) if name in (*PROOFS, TOKENIZER, CONFIG) or is_of_tensors(name)]
    bad = []
    for name in names:
        if name in (TOKENIZER, CONFIG):
            differs = _differing_files(store, name)
        else:
            differs = _differing_tensors(store, teacher, name) if is_of_tensors(name) else []
        if differs:
            bad.append(f"sidecar {name} is not this teacher's: {'; '.join(differs[:3])}")
    return names, [*bad, *_broken_derivations(store, teacher, names, device)]


def _names(store: TeacherStore) -> list[str]:
    from ...pipeline.store.sidecar import list_sidecars

    return list_sidecars(store.files)


def _differing_tensors(store: TeacherStore, teacher: Teacher, name: str) -> list[str]:
    import numpy as np

    from ..cache_teacher.sidecars import has_sidecar, tensors_of

    kept = store.sidecar(name)
    live = dict(tensors_of(teacher.load("auto"), name)) if has_sidecar(teacher, name) else {}
    return [
        tensor
        for tensor in sorted({*kept, *live})
        if tensor not in kept
        or tensor not in live
        or kept[tensor].dtype != live[tensor].dtype
        or not np.array_equal(kept[tensor], live[tensor])
    ]


def _differing_files(store: TeacherStore, name: str) -> list[str]:
    """Fields in which the tokenizer or the config that is kept differs from the identity of the store."""
    from transformers import AutoConfig, AutoTokenizer

    from ..cache_teacher.identity import behaviour_config, differing_behaviour
    from ..cache_teacher.sidecars import TOKENIZER

    folder = store.sidecar_folder(name)
    try:
        if name == TOKENIZER:
            return differing_behaviour(store.identity.tokenizer, AutoTokenizer.from_pretrained(folder))
        return differing_fields(store.identity.teacher["config"], behaviour_config(AutoConfig.from_pretrained(folder)))
    except Exception as error:  # whatever transformers raises on files that are not its own
        return [f"it cannot be read ({(str(error).strip().splitlines() or [type(error).__name__])[0][:120]})"]


def _broken_derivations(store: TeacherStore, teacher: Teacher, names: list[str], device: str) -> Iterator[str]:
    """What readers derive, and what does not follow for this teacher."""
    from ..cache_teacher.shortcuts import try_scores, try_shortcuts
    from ..cache_teacher.sidecars import ATTENTION, has_sidecar, is_of_tensors

    dtype = str(store.identity.capture["dtype"])
    used = [
        name
        for name in names
        if is_of_tensors(name) and has_sidecar(teacher, name)
        and (name.startswith(ATTENTION) or not {*USED_WITH.get(name, ())}.isdisjoint(names))
    ]  # fmt: skip
    if used and store.catalogue().num_shards:
        rows = store.read_tokens(0)
        tried = try_shortcuts(teacher, used, rows.token_ids, rows.segment_ids, dtype=dtype, device=device)
        yield from (str(shortcut) for shortcut in tried.values() if not shortcut.holds)
    if "attention.proof" in names:
        scores = try_scores(teacher, range(1, teacher.num_layers + 1), dtype=dtype, device=device)
        if not scores.holds:
            yield f"{scores.signal} is not query times key: {scores.why}"
