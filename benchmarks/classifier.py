"""Labels per second: a head over labels against a chat model that writes them, on the same held-out rows, in turn.

    forge run jobs/quickstart.yaml && forge run jobs/classify.yaml        the two versions, in one store
    python benchmarks/classifier.py --head sections-head --chat debian-sections

Both answer every row as `forge eval` has them answer: the head in one forward pass a text, texts of like length together;
the chat model greedily, up to 8 tokens, 64 prompts in its engine at once; and by the likelihood of every label, so as to
have a probability for each. Opening the models is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

SHARE = 64  # prompts that the chat model's engine is given at once


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default=os.environ.get("FORGE_STORE", ".forge"))
    parser.add_argument("--head", default="sections-head", help="alias or version of a classifier")
    parser.add_argument("--chat", default="debian-sections", help="alias or version that writes labels")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from forge_ray.config.release import EvalConfig
    from forge_ray.data.tokens.chat import prompt_ids
    from forge_ray.evaluate.examples import answer_ids, held_out
    from forge_ray.evaluate.reports import model_subject
    from forge_ray.evaluate.score import tokenizer_for
    from forge_ray.inference.choose import open_engine
    from forge_ray.inference.classifier import logits_of, open_classifier
    from forge_ray.inference.engine import GenerationRequest
    from forge_ray.models.class_head import targets_of
    from forge_ray.records import DatasetManifest, RunRecord
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    torch.set_num_threads(options.threads)
    store, config = Store(options.store), EvalConfig(max_examples=options.texts, cpus=options.threads)
    with Catalog.read_only(store) as catalog:
        chat, head = (catalog.model(name) for name in (options.chat, options.head))
        manifest = catalog.get_as(DatasetManifest, catalog.get_as(RunRecord, chat.run).dataset)
        places = {version.id: model_subject(catalog, version).fetch(store) for version in (chat, head)}
    folder, adapter = places[chat.id]
    tokenizer = tokenizer_for(store, manifest, folder, adapter)
    rows = held_out(store, manifest, config).chats
    prompts = [tuple(prompt_ids(tokenizer, list(row.messages))) for row in rows]
    engine = open_engine(folder, adapter, config.engine, use_gpu=False)
    folder, adapter = places[head.id]
    targets = (adapter and targets_of(adapter)) or targets_of(folder)
    classifier = open_classifier(folder, adapter, targets, tokenizer, config.engine, False)

    def write() -> int:
        requests = [GenerationRequest(prompt, 8, stop_token_ids=tokenizer.end_ids) for prompt in prompts]
        parts = [requests[start : start + SHARE] for start in range(0, len(requests), SHARE)]
        return sum(len(answer.token_ids) for part in parts for answer in engine.generate(part))

    def read() -> int:
        return sum(1 for _ in logits_of(classifier, prompts))

    labels = [answer_ids(tokenizer, rows[0], {"role": "assistant", "content": label}) for label in targets[0].labels]

    def weigh() -> int:
        return sum(map(len, engine.score_all([(prompt, labels) for prompt in prompts])))

    seconds: dict[str, list[float]] = {"head": [], "chat": [], "likelihood": []}
    num_tokens = 0
    for _ in range(options.rounds):
        for name, answer in (("head", read), ("chat", write), ("likelihood", weigh)):
            began = time.perf_counter()
            count = answer()
            seconds[name].append(time.perf_counter() - began)
            num_tokens = count if name == "chat" else num_tokens
    engine.close()
    ratios = {
        name: statistics.median(one / head_s for one, head_s in zip(values, seconds["head"], strict=True))
        for name, values in seconds.items()
    }
    return {
        "texts": len(prompts),
        "tokens_per_text": statistics.mean(map(len, prompts)),
        "written_tokens_per_text": num_tokens / len(prompts),
        "texts_per_s": {name: len(prompts) / statistics.median(values) for name, values in seconds.items()},
        "head_is_faster_by": ratios,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    options = arguments()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    report = measure(options)
    if options.json:
        print(json.dumps(report))
        return
    rates, ratios = report["texts_per_s"], report["head_is_faster_by"]
    print(
        f"{report['texts']} texts of {report['tokens_per_text']:.0f} tokens with the template's; load {report['load']:.1f}"
    )
    print(f"  head over labels                    {rates['head']:8.1f} texts/s")
    wrote = f"{report['written_tokens_per_text']:.1f} tokens written a text"
    print(f"  chat model, greedy                  {rates['chat']:8.1f} texts/s; head / this {ratios['chat']:.2f}; {wrote}")
    print(
        f"  chat model, likelihood of labels    {rates['likelihood']:8.1f} texts/s; head / this {ratios['likelihood']:.2f}"
    )


if __name__ == "__main__":
    main()
