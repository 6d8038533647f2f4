"""Answers put to the prompts of other rows: by how much they gain, KTO's reference point z0 is set (arXiv:2402.01306, 4.1).

The other answers are those of the same packed row, each moved on by one document, so that the row keeps its length and z0
depends neither on the number of workers nor on passes, and whatever erases a row takes its part of z0 with it. A row of one
document has none.

Shapes: B rows, T tokens, S documents of a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from forge_ray.data.dataset.stream import Rows
from forge_ray.train.loss import segment_sums, token_logps
from forge_ray.train.measure import PIECE_ROWS, Measure, RowValues, by_segment, largest_difference
from forge_ray.train.method import Batch, Column, Forward
from forge_ray.train.reference import Reference

Ints = npt.NDArray[np.int64]


def moved_answers(batch: Batch) -> Batch:
    """The rows with each document's answer, its tokens from the first trained one on, taken from the document before it (the
    first one's from the last). A row of one document, and padding, hold no document."""
    names = ("input_ids", "segment_ids", "loss_mask")
    arrays = {name: batch[name].cpu().numpy() for name in names}
    rows = [_moved(*(arrays[name][lane] for name in names)) for lane in range(len(arrays["input_ids"]))]
    device = batch["input_ids"].device
    stacked = {name: torch.from_numpy(np.stack([row[place] for row in rows])) for place, name in enumerate(names)}
    positions = _positions(stacked["segment_ids"])
    return {name: values.to(device) for name, values in (stacked | {"position_ids": positions}).items()}


def _moved(ids_T: Ints, segments_T: Ints, mask_T: Ints) -> tuple[Ints, Ints, Ints]:
    documents = [np.flatnonzero(segments_T == number) for number in range(1, int(segments_T.max(initial=0)) + 1)]
    ids, segments, mask = np.zeros_like(ids_T), np.zeros_like(segments_T), np.zeros_like(mask_T)
    if len(documents) > 1:
        cuts = [int(np.argmax(mask_T[places] > 0)) for places in documents]
        answers = [places[cut:] for places, cut in zip(documents, cuts, strict=True)]
        end = 0
        for number, (places, cut) in enumerate(zip(documents, cuts, strict=True)):
            taken = np.concatenate([places[:cut], answers[number - 1]])
            part = slice(end, end + len(taken))
            ids[part], segments[part] = ids_T[taken], number + 1
            mask[part][cut:] = mask_T[answers[number - 1]]
            end += len(taken)
    return ids, segments, mask


def _positions(segments_BT: Tensor) -> Tensor:
    """Positions within each document, and within the padding behind the last one."""
    places = torch.arange(segments_BT.shape[1])
    begins = torch.ones_like(segments_BT, dtype=torch.bool)
    begins[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return places - (places * begins).cummax(dim=1).values


def logps_with_moved() -> Measure:
    """Of each document of a row the log p of its trained tokens, and of the one with the moved answer."""
    types = {"logps": pa.float32(), "moved_logps": pa.float32()}
    return Measure(("moved",), types, PIECE_ROWS, _logps_with_moved, largest_difference)


def _logps_with_moved(forward: Forward, batch: Batch) -> RowValues:
    count = int(batch["segment_ids"].max())
    return {
        name: _document_sums(forward, part)[0][0, :count].float().cpu().numpy()
        for name, part in (("logps", batch), ("moved_logps", moved_answers(batch)))
    }


def moved_logps(reference: Reference) -> Column:
    """What the reference gives the documents with moved answers: [B, S]."""

    def read(rows: Rows, numbers: list[int]) -> npt.NDArray[np.float32]:
        return by_segment([values["moved_logps"].tolist() for values in reference.read(rows, numbers)], 0.0)

    return Column("moved_logps", "segment", blank=0.0, read=read)


def change_of_moved(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
    """(sum over documents with moved answers of log p minus the reference's, number of these documents): fp32 [] each."""
    sums_BS, counts_BS = _document_sums(forward, moved_answers(batch))
    is_document = counts_BS > 0
    width = sums_BS.shape[1]
    return (sums_BS - batch["moved_logps"][:, :width])[is_document].sum(), is_document.sum().float()


def _document_sums(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
    logps_K, positions_K = token_logps(forward, batch)
    return segment_sums(logps_K, positions_K, batch)
