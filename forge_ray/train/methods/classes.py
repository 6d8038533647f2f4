"""Training a classifier: a head over labels, read at the last token of each document, of which a packed row holds several.

Of a document x, with logits z of the labels of a target, smoothing e over its C labels, and w the weight of a label:

    single   w_y sum over c of q_c (-log softmax(z)_c), q_y = 1 - e + e / C, otherwise e / C     (arXiv:1512.00567, eq. 7)
    multi    mean over c of -(w_c q_c log s(z_c) + (1 - q_c) log(1 - s(z_c))), q_c = y_c (1 - e) + e / 2, s the sigmoid

A document's loss is the sum over the targets that it has a label of, each times the target's weight. Losses are divided by
the labelled documents of the whole step: weights of labels change their shares, not the size of a step.

`class_weights: balanced`: of single n / (C n_c), of multi negatives / positives, of the training documents; 1 for a label
that none of them has. Left out: heads of several layers, pooling over all tokens, and losses of ordered labels.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from forge_ray.config.classify import Classify, class_names, columns_of
from forge_ray.data.dataset.labels import ABSENT, count_labels, values_of
from forge_ray.data.dataset.stream import Rows
from forge_ray.data.record.schema import Reject
from forge_ray.errors import DataError
from forge_ray.models.architecture import Head
from forge_ray.train import attention
from forge_ray.train.job import TrainJob
from forge_ray.train.method import Batch, Column, Forward, Method, Sums


def classes(job: TrainJob, config: Classify) -> Method:
    return Method(
        loss=partial(loss, config, label_weights(job, config)),
        weight=num_labelled,
        columns=(Column("labels", "segment", blank=ABSENT, read=partial(read_labels, config)),),
        head=Head(config.targets),
    )


def num_labelled(batch: Batch) -> Tensor:
    """Documents with a label of at least one target: int64 []."""
    return (batch["labels"] != ABSENT).any(dim=2).sum()


def read_labels(config: Classify, rows: Rows, numbers: list[int]) -> npt.NDArray[np.int8]:
    """[B, S, C]: 1, 0 or `ABSENT` of each label (`dataset/labels.py`). Raises `DataError` for a label of no target."""
    texts = rows.labels(numbers)
    num_classes = sum(len(target.labels) for target in config.targets)
    labels = np.full((len(numbers), max(map(len, texts)), num_classes), ABSENT, np.int8)
    for lane, of_row in enumerate(texts):
        for segment, text in enumerate(of_row):
            try:
                labels[lane, segment] = values_of(config.targets, text)
            except Reject as reason:
                raise DataError(
                    f"{rows.records(numbers)[lane][segment]} cannot be trained: {reason}",
                    hint="add the label to train.method.targets, or drop such rows with a rule of data.curate",
                ) from reason
    return labels


def label_weights(job: TrainJob, config: Classify) -> Tensor:
    """fp32 [C]."""
    if isinstance(config.class_weights, dict):
        return torch.tensor([config.class_weights.get(name, 1.0) for name in class_names(config.targets)])
    weights = np.ones(sum(len(target.labels) for target in config.targets))
    if config.class_weights == "balanced":
        counts = count_labels(job.store, job.dataset, "train", config.targets)
        for target, columns in zip(config.targets, columns_of(config.targets), strict=True):
            positive, negative = counts.positive[columns], counts.negative[columns]
            above = negative if target.loss == "multi" else positive.sum() / len(target.labels)
            weights[columns] = np.where(positive > 0, above / np.maximum(positive, 1), 1.0)
    return torch.tensor(weights, dtype=torch.float32)


def loss(config: Classify, weights_C: Tensor, forward: Forward, batch: Batch) -> Sums:
    """K documents of the pass. One without a document reads the first token, whose logits are not used."""
    logits_KC, labels_KC = logits_and_labels(forward, batch)
    weights_C = weights_C.to(logits_KC.device)
    total, right, asked = 0 * logits_KC.sum(), logits_KC.new_zeros(len(logits_KC)), logits_KC.new_zeros(len(logits_KC))
    for target, columns in zip(config.targets, columns_of(config.targets), strict=True):
        has_K = labels_KC[:, columns.start] != ABSENT
        logits, truth, weights = logits_KC[has_K, columns], labels_KC[has_K, columns].float(), weights_C[columns]
        if target.loss == "single":
            smooth = config.label_smoothing
            expected = truth * (1 - smooth) + smooth / len(target.labels)
            losses = -(expected * logits.log_softmax(dim=1)).sum(dim=1) * (truth * weights).sum(dim=1)
            right[has_K] += (logits.argmax(dim=1) == truth.argmax(dim=1)).float()
        else:
            expected = truth * (1 - config.label_smoothing) + config.label_smoothing / 2
            by_label = F.binary_cross_entropy_with_logits(logits, expected, pos_weight=weights, reduction="none")
            losses = by_label.mean(dim=1)
            right[has_K] += ((logits > 0) == (truth > 0)).all(dim=1).float()
        asked[has_K] += 1
        total = total + target.weight * losses.sum()
    return Sums(total, {"accuracy": (right / asked.clamp(min=1)).sum()})


def logits_and_labels(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the K documents of a pass, in the order of its rows laid end to end: fp32 logits [K, C], labels int8 [K, C]."""
    last_K = torch.nonzero(batch["loss_mask"].flatten()).flatten()
    is_blank = not len(last_K)
    last_K = last_K.new_zeros(1) if is_blank else last_K
    positions = batch["position_ids"].reshape(1, -1)
    output = forward(
        input_ids=batch["input_ids"].reshape(1, -1),
        position_ids=positions,
        logits_to_keep=last_K,
        use_cache=False,
        **attention.bounds(attention.edges(positions[0])),
    )
    rows_K, length = last_K // batch["input_ids"].shape[1], batch["labels"].shape[1]
    segments_K = (batch["segment_ids"].flatten()[last_K] - 1).clamp(min=0, max=length - 1)
    labels_KC = batch["labels"][rows_K, segments_K]
    return output.logits[0].float(), torch.full_like(labels_KC, ABSENT) if is_blank else labels_KC
