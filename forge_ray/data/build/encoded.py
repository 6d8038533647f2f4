"""Records → documents in a job of the map stage; what a fast encoder makes of the build's own rows is compared.

Of each job some records, and of all others one in a thousand, are encoded by the reference as well. One that differs ends
the use of the fast encoder: the build begins again without it (`build.build`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forge_ray.config.data import DataConfig
from forge_ray.data.build.parts import MappedRecord
from forge_ray.data.build.settings import BuildSpec
from forge_ray.data.dataset.encoders import kept_proof, key_of, load_fast, prove_tokenizer
from forge_ray.data.dataset.version import load_tokenizer, record_bytes
from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.chat import encode_batch, inner_tokenizer
from forge_ray.data.tokens.equality import Proof
from forge_ray.data.tokens.fast import NAME, REFERENCE, FastEncoder
from forge_ray.data.tokens.hf import HfTokenizer
from forge_ray.data.tokens.template import ChatTokenizer, Encoded
from forge_ray.errors import EncodersDiffer
from forge_ray.store.files import Store

FIRST, ONE_IN = 16, 1000  # records of a job that are compared, and of its others one in so many
FAST_BYTES = 16 << 20  # of text from which a fast encoder is opened, which takes every worker more than half a second
Documents = list[Encoded] | Reject


def proof_for(spec: BuildSpec) -> Proof | None:
    """What is proven of the fast encoder for the tokenizer of a build; None where the build is too small to use it. Needs an
    initialised Ray, where nobody has looked yet."""
    import ray

    if sum(file.text_bytes for file in spec.sources) < FAST_BYTES:
        return None
    key = key_of(spec.base)
    if (proof := kept_proof(spec.store, key)) is None:
        spec.progress(0, 1, "comparing encoders")
        proof = ray.get(ray.remote(prove_tokenizer).remote(spec.store, spec.base.id, key))
    return proof


@dataclass
class JobEncoder:
    """Encodes the records of one job. `fast` makes the ids of `tokenizer`, None where the reference does."""

    tokenizer: ChatTokenizer
    reference: ChatTokenizer
    fast: FastEncoder | None
    num_compared: int = 0

    def documents(self, batch: Sequence[MappedRecord], config: DataConfig) -> list[Documents]:
        """As `encode_batch`; raises `EncodersDiffer`."""
        results = _encoded(self.tokenizer, batch, config)
        if self.fast is None:
            return results
        if self.fast.failure:
            raise EncodersDiffer(f"{self.fast.failure}, {_place(batch[0])} or soon behind it")
        chosen = [number for number, item in enumerate(batch) if self._is_compared(number, item)]
        for number, expected in zip(chosen, _encoded(self.reference, [batch[n] for n in chosen], config), strict=True):
            if not same(results[number], expected):
                raise EncodersDiffer(f"{NAME} and {REFERENCE} make other tokens of one record, {_place(batch[number])}")
        self.num_compared += len(chosen)
        return results

    def _is_compared(self, number: int, item: MappedRecord) -> bool:
        if self.num_compared == 0 and number < FIRST:
            return True
        return int.from_bytes(record_bytes(item.record.canonical)[:8], "big") % ONE_IN == 0


def job_encoder(store: Store, base: str, config: DataConfig, left: str | None) -> JobEncoder:
    """`left`: the characters whose texts are left to the reference; None where all are."""
    reference = load_tokenizer(store, base, config.date, config.tools)
    if left is None:
        return JobEncoder(reference, reference, None)
    tokenizer = load_fast(store, base, config.date, config.tools, left)
    inner = inner_tokenizer(tokenizer)
    return JobEncoder(tokenizer, reference, inner.fast if isinstance(inner, HfTokenizer) else None)


def _encoded(tokenizer: ChatTokenizer, batch: Sequence[MappedRecord], config: DataConfig) -> list[Documents]:
    records = [item.record for item in batch]
    return encode_batch(tokenizer, records, config.sequence_length, config.overlong, config.reasoning, config.form)


def same(one: Documents, other: Documents) -> bool:
    """Whether two results of `encode_batch` for one record are equal in every token and every bit of the mask."""
    if isinstance(one, Reject) or isinstance(other, Reject):
        return isinstance(one, Reject) and isinstance(other, Reject) and str(one) == str(other)
    return len(one) == len(other) and all(
        np.array_equal(a.ids, b.ids) and np.array_equal(a.loss_mask, b.loss_mask) and a.truncated == b.truncated
        for a, b in zip(one, other, strict=True)
    )


def _place(item: MappedRecord) -> str:
    return f"{item.record.id} of line {item.line}"
