"""KL divergence to the model that a run started from, on the answers of held-out rows.

At each token of a held-out answer y (of a pair the preferred one) after its prompt x, exactly over the vocabulary:

    KL(p || p_start) = sum over v of p(v | x, y before it) (log p(v | …) - log p_start(v | …))

in nats, in fp32 of the logits; the metric `kl` is the mean over the tokens of all answers, the end of the turn included. It
is taken along answers that people wrote and not along the model's own: it says how far training moved the model on the task,
and is no estimate of the KL divergence of whole answers, for which the model would have to generate them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_ray.config.release import EvalConfig
from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.evaluate.examples import Example, answer_ids
from forge_ray.machine.hardware import resolve_precision

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 256  # tokens whose logits are widened to fp32 at a time
Logits = Callable[[list[int], int], "Tensor"]  # (ids, n): logits [n, V] of the last n positions


def score_kl(
    folders: tuple[Path, Path | None],
    start: tuple[Path, Path | None],
    tokenizer: ChatTokenizer,
    chats: Sequence[Example],
    config: EvalConfig,
) -> Iterator[dict[str, Any]]:
    """Of each of the first `eval.kl.max_examples` answers that the template has a place for: `record`, `kl` (nats, the sum
    over its tokens) and `kl_tokens`. (model, adapter or None): `folders` of the trained one, `start` of the one before."""
    assert config.kl is not None
    with _opened(folders, start, config) as (trained, before):
        for example in chats[: config.kl.max_examples]:
            try:
                prompt = list(tokenizer.prompt_ids(list(example.messages), example.tools))
                answer = answer_ids(tokenizer, example, example.turn)
            except Reject:
                continue  # counted where the row's other scores are
            ids, count = prompt + answer, len(answer)
            total = kl_nats(trained(ids, count + 1), before(ids, count + 1)) if prompt and answer else 0.0
            yield {"record": example.record, "kl": total, "kl_tokens": count}


def kl_nats(trained_TV: Tensor, before_TV: Tensor) -> float:
    """Sum over positions of KL(trained || before), exact over the vocabulary; the last position, which predicts nothing that
    is there, is left out."""
    import torch

    total = 0.0
    for begin in range(0, len(trained_TV) - 1, CHUNK):
        part = slice(begin, min(begin + CHUNK, len(trained_TV) - 1))
        ours, theirs = (logits[part].float().log_softmax(-1) for logits in (trained_TV, before_TV))
        total += float((ours.exp() * (ours - theirs)).sum(dtype=torch.float64))
    return total


@contextlib.contextmanager
def _opened(
    folders: tuple[Path, Path | None], start: tuple[Path, Path | None], config: EvalConfig
) -> Iterator[tuple[Logits, Logits]]:
    """The logits of both models. Of an adapter on the weights that the run started from one model is held, whose adapter is
    switched off for the other; else two are."""
    import torch
    from peft import PeftModel

    from forge_ray.inference.load import DTYPES
    from forge_ray.models.architecture import open_model

    use_gpu = config.gpus > 0
    dtype, device = DTYPES[resolve_precision(config.engine.precision, use_gpu)], "cuda" if use_gpu else "cpu"

    def opened(folder: Path, adapter: Path | None) -> Any:
        model: Any = open_model(folder, dtype)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter), is_trainable=False, local_files_only=True)
        return model.to(device).eval()

    def logits_of(model: Any, ids: list[int], count: int) -> Tensor:
        inputs = torch.tensor([ids], device=device)
        logits: Tensor = model(input_ids=inputs, use_cache=False, logits_to_keep=count).logits[0]
        return logits

    with torch.inference_mode():
        trained = opened(*folders)
        if folders[1] is not None and start == (folders[0], None):

            def before(ids: list[int], count: int) -> Tensor:
                with trained.disable_adapter():
                    return logits_of(trained, ids, count)

        else:
            other = opened(*start)

            def before(ids: list[int], count: int) -> Tensor:
                return logits_of(other, ids, count)

        yield lambda ids, count: logits_of(trained, ids, count), before
