"""Checks of every document and of every packed row: what is trained is what should be, or the reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.data.tokens.template import ChatTokenizer, Encoded

NOTHING = "no trained token"
END_ALONE = "of a trained answer only the end token is trained"
OPEN_END = "the end token of a trained answer is not trained"
TWO_BEGINS = "the begin token is doubled"


def prove(tokenizer: ChatTokenizer, documents: Sequence[Encoded]) -> dict[int, str]:
    """Index → reason of each document that must not be trained; all documents are looked at in one pass.

    A run of trained tokens ends with the end token. Two may reach a document's end without it: the answer of a chat that
    was cut, and a piece of a longer plain text, where everything but the first token is trained.
    """
    if not documents:
        return {}
    lengths = np.array([len(document.ids) for document in documents])
    ids = np.concatenate([document.ids for document in documents])
    mask = np.concatenate([document.loss_mask for document in documents]) > 0
    ends = np.cumsum(lengths)
    starts = ends - lengths
    owner = np.repeat(np.arange(len(documents)), lengths)
    problems: dict[int, str] = {}
    if (bos := tokenizer.bos_id) is not None:
        long = lengths > 1
        doubled = (ids[starts[long]] == bos) & (ids[starts[long] + 1] == bos)
        problems |= dict.fromkeys(np.flatnonzero(long)[doubled].tolist(), TWO_BEGINS)
    trained = np.bincount(owner, weights=mask, minlength=len(documents)).astype(np.int64)
    last_of_document = np.zeros(len(ids), bool)
    last_of_document[ends[lengths > 0] - 1] = True
    following = np.append(mask[1:], False) & ~last_of_document
    open_end = mask & ~following & ~np.isin(ids, tokenizer.end_ids)
    may_be_open = np.array([document.truncated for document in documents]) | (trained == lengths - 1)
    open_end &= ~(last_of_document & may_be_open[owner])
    problems |= dict.fromkeys(owner[open_end].tolist(), OPEN_END)
    preceding = np.insert(mask[:-1], 0, False)
    preceding[starts[lengths > 0]] = False
    end_alone = mask & ~preceding & ~following & np.isin(ids, tokenizer.end_ids) & (trained[owner] != lengths[owner] - 1)
    problems |= dict.fromkeys(owner[end_alone].tolist(), END_ALONE)
    first_trained = np.zeros(len(documents), bool)
    first_trained[lengths > 0] = mask[starts[lengths > 0]]
    problems |= dict.fromkeys(np.flatnonzero(trained - first_trained == 0).tolist(), NOTHING)
    return problems


def prove_packed(
    input_ids: npt.NDArray[Any], loss_mask: npt.NDArray[Any], segment_ids: npt.NDArray[Any], pad_id: int
) -> list[str]:
    """Problems of packed rows, arrays [rows, sequence_length]; empty when there are none. Segment 0 is padding."""
    problems: list[str] = []

    def report(rows: Any, what: str) -> None:
        if rows.any():
            problems.append(f"row {int(rows.argmax())}: {what} ({int(rows.sum())} of {len(rows)} rows)")

    padding = segment_ids == 0
    starts = np.ones(segment_ids.shape, bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    step = np.diff(segment_ids, axis=1, prepend=0)
    report(((loss_mask != 0) & (loss_mask != 1)).any(axis=1), "the loss mask is neither 0 nor 1")
    report(((loss_mask > 0) & padding).any(axis=1), "padding is trained")
    report(((loss_mask > 0) & starts & ~padding).any(axis=1), "the first token of a segment is trained, across its border")
    report((padding & (input_ids != pad_id)).any(axis=1), "padding is not the pad token")
    # from 1 upwards in steps of one, then padding to the end: each document is a run of its own
    report((starts & ~padding & (step != 1)).any(axis=1), "segments are not numbered from 1 in order")
    report((np.diff(padding.astype(np.int8), axis=1) < 0).any(axis=1), "a segment stands behind padding")
    return problems
