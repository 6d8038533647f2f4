"""Logits of texts → the bodies of `/v1/classifications` (Mistral's) and `/v1/moderations` (OpenAI's and Mistral's), and the
labels that a route's rules look at (no ray, no torch)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from forge_ray.config.classify import columns_of
from forge_ray.data.tokens.labels import PAD_AT_END
from forge_ray.errors import EngineError
from forge_ray.inference.classifier import Logits, probabilities
from forge_ray.serve.calibration import HALF, ClassHead
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError

Ids = tuple[int, ...]


async def logits_of_group(loaded: Loaded, documents: Sequence[Ids], caller: str) -> Logits:
    """[n, C] of texts that one forward pass can take, in float64. Cancelling it takes them out of the engine's queue. Raises
    `EngineError` where one is not a number, which has no JSON and no place in an order."""
    engine, _ = loaded.classifier
    logits = await asyncio.wrap_future(engine.submit(documents, caller))
    if not np.isfinite(logits).all():
        raise EngineError(
            f"the classifier {loaded.version} gives logits that are not finite numbers",
            hint="evaluate the version with `forge eval`; where it is right there, set engine.precision=fp32",
        )
    return logits


def refuse_unreadable(loaded: Loaded, documents: Sequence[Ids], limit: int) -> None:
    """`ApiError` 400 for a text whose last token the head cannot be read at; `limit`: of the deployment, 0 for none."""
    longest = loaded.engine.max_request_tokens
    limit = min(limit or longest, longest)
    for number, ids in enumerate(documents):
        if not 1 <= len(ids) <= limit:
            rule = f"input: text {number} has {len(ids)} tokens; 1 to {limit} are allowed"
            raise ApiError(400, rule, param="input", code="context_length_exceeded")
        if ids[-1] == loaded.tokenizer.pad_id:
            raise ApiError(400, f"input: text {number}: {PAD_AT_END}", param="input")


def shares_of(head: ClassHead, logits: Logits) -> Logits:
    """Probabilities [C] of the labels of all targets of one text, after temperature scaling."""
    shares = np.zeros(len(logits))
    for target, columns in zip(head.targets, columns_of(head.targets), strict=True):
        shares[columns] = probabilities(target, logits[columns], head.temperatures.get(target.name, 1.0))
    return shares


def holding(head: ClassHead, shares: Logits) -> tuple[str, ...]:
    """Names (`class_names`) of the labels that hold: of a `single` target the likeliest, of a `multi` one those from their
    threshold, or from one half."""
    names, hold = head.names, []
    for target, columns in zip(head.targets, columns_of(head.targets), strict=True):
        if target.loss == "single":
            hold.append(names[columns.start + int(shares[columns].argmax())])
        else:
            own = range(columns.start, columns.stop)
            hold += [names[at] for at in own if shares[at] >= head.thresholds.get(names[at], HALF)]
    return tuple(hold)


def card_of(head: ClassHead) -> dict[str, Any]:
    """What a model's card says of its head: targets, temperatures and thresholds with the report that they are from (null
    where there is none: logits are not scaled), and the labels that flag a text."""
    return {
        "targets": [target.model_dump(mode="json", exclude={"weight"}) for target in head.targets],
        "temperatures": dict(head.temperatures),
        "thresholds": dict(head.thresholds),
        "unreached": dict(head.unreached),
        "flags": list(head.flags),
        "report": head.report or None,
    }


def classification(head: ClassHead, logits: Logits) -> dict[str, Any]:
    """Target → Mistral's `scores` by label, and `labels`, those that hold."""
    shares = shares_of(head, logits)
    hold, names = set(holding(head, shares)), head.names
    return {
        target.name: {
            "scores": dict(zip(target.labels, shares[columns].tolist(), strict=True)),
            "labels": [label for label, name in zip(target.labels, names[columns], strict=True) if name in hold],
        }
        for target, columns in zip(head.targets, columns_of(head.targets), strict=True)
    }


def moderation(head: ClassHead, logits: Logits) -> dict[str, Any]:
    """OpenAI's result of one text; the categories are the labels that flag it. One with a threshold holds from there, of a
    `single` target too."""
    shares, names = shares_of(head, logits), head.names
    hold = set(holding(head, shares))
    scores = {name: float(share) for name, share in zip(names, shares, strict=True) if name in head.flags}
    categories = {
        name: share >= head.thresholds[name] if name in head.thresholds else name in hold for name, share in scores.items()
    }
    return {
        "flagged": any(categories.values()),
        "categories": categories,
        "category_scores": scores,
        "category_applied_input_types": {name: ["text"] for name in scores},
    }
