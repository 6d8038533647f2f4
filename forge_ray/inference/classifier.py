"""A model with a head over labels: texts in, logits out, by transformers' own class (torch on first use)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.config.classify import Target
from forge_ray.config.release import EngineConfig
from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.machine.hardware import resolve_precision

Logits = npt.NDArray[np.float64]
Ids = Sequence[int] | npt.NDArray[np.int32]


@dataclass(frozen=True)
class Classifier:
    """A model with a head over the labels of `targets`, on its device."""

    model: Any
    tokenizer: ChatTokenizer
    targets: tuple[Target, ...]
    max_batch_tokens: int

    @property
    def max_text_tokens(self) -> int:
        """Of one text, the template's included; where the configuration states none, more than any has."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)


def open_classifier(
    folder: Path,
    adapter: Path | None,
    targets: tuple[Target, ...],
    tokenizer: ChatTokenizer,
    config: EngineConfig,
    use_gpu: bool,
) -> Classifier:
    """The model of `folder`, with the PEFT adapter of `adapter` summed into its weights, for evaluation and for
    endpoints: its two narrow products beside each layer took a third to a half of the time."""
    import torch

    from forge_ray.inference.load import DTYPES
    from forge_ray.inference.merge import summed_model
    from forge_ray.models.architecture import Head

    model = summed_model(folder, adapter, DTYPES[resolve_precision(config.precision, use_gpu)], Head(targets))
    model.config.get_text_config().pad_token_id = tokenizer.pad_id
    device = torch.device("cuda" if use_gpu else "cpu")
    return Classifier(model.to(device).eval(), tokenizer, targets, config.max_batch_tokens)


def logits_of(classifier: Classifier, documents: Sequence[Ids]) -> Iterator[tuple[int, Logits]]:
    """(number of a document, its logits [C]) in the order of lengths; as many in a pass as `max_batch_tokens` allows."""
    order = sorted(range(len(documents)), key=lambda number: len(documents[number]))
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and len(documents[order[end]]) * (end + 1 - start) <= classifier.max_batch_tokens:
            end += 1
        numbers = order[start:end]
        yield from zip(numbers, logits_of_pass(classifier, [documents[number] for number in numbers]), strict=True)
        start = end


def logits_of_pass(classifier: Classifier, documents: Sequence[Ids]) -> Logits:
    """[n, C] of documents that one forward pass takes, padded to the longest of them."""
    import torch

    padded = np.full((len(documents), max(map(len, documents))), classifier.tokenizer.pad_id, np.int64)
    mask = np.zeros(padded.shape, np.int64)
    for row, ids in enumerate(documents):
        padded[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    device = next(classifier.model.parameters()).device
    with torch.no_grad():
        inputs = {"input_ids": torch.from_numpy(padded), "attention_mask": torch.from_numpy(mask)}
        output = classifier.model(**{name: value.to(device) for name, value in inputs.items()})
    logits: Logits = output.logits.double().cpu().numpy()
    return logits


def probabilities(target: Target, logits: Logits, temperature: float = 1.0) -> Logits:
    """[..., C] of logits [..., C] of one target."""
    scaled = logits / temperature
    if target.loss == "multi":
        independent: Logits = np.exp(-np.logaddexp(0, -scaled))
        return independent
    shares: Logits = np.exp(scaled - np.logaddexp.reduce(scaled, axis=-1, keepdims=True))
    return shares
