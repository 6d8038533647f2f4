"""Plain text through an Engine: log-probabilities of its tokens over windows that overlap by half.

Every token is scored once, with at least half a window of text before it, but those of a document's first window, which have
what there is (the strided evaluation of https://huggingface.co/docs/transformers/perplexity). Before the first token stands
what the tokenizer begins a text with, else the token that ends texts, so that every token of every tokenizer is scored and
bits per byte can be compared over models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.evaluate.examples import UNPOSED, TextExample
from forge_ray.inference.engine import Engine

MIN_WINDOW = 4


def score_texts(
    engine: Engine, tokenizer: ChatTokenizer, texts: Sequence[TextExample], window: int
) -> Iterator[dict[str, Any]]:
    """One item per text, in order: log-probability in nats, tokens, and bytes of its UTF-8. `window`: tokens per pass. A
    text that the tokenizer cannot encode is an item with `left_out`, the reason."""
    size = max(MIN_WINDOW, min(window, engine.max_request_tokens))
    for example, ids in zip(texts, tokenizer.text_ids([example.text for example in texts]), strict=True):
        if isinstance(ids, Reject):
            yield {"record": example.record, "left_out": f"{UNPOSED}{ids}"}
            continue
        logprob = sum(engine.score(prompt, [scored])[0].logprob for prompt, scored in windows(tokenizer, ids, size))
        yield {
            "kind": "text",
            "record": example.record,
            "source": example.source,
            "logprob": logprob,
            "num_tokens": len(ids) - _begins(tokenizer, ids),
            "num_bytes": len(example.text.encode("utf-8", "surrogatepass")),
        }


def _begins(tokenizer: ChatTokenizer, ids: Sequence[int]) -> int:
    return int(ids[:1] == [tokenizer.bos_id])


def windows(tokenizer: ChatTokenizer, ids: Sequence[int], size: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, tokens to score): together at most `size` tokens."""
    whole = list(ids) if _begins(tokenizer, ids) else [tokenizer.end_of_turn_id, *ids]
    start = 1
    while start < len(whole):
        end = min(len(whole), max(start + size // 2, size))
        yield whole[max(0, end - size) : start], whole[start:end]
        start = end
