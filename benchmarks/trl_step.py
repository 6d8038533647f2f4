"""TRL's trainer on the rows of `train_step.py`."""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import torch
from random_models import configuration, random_batch, random_model
from train_step import result, start_of_peak

from forge_ray.data.dataset.stream import COLUMNS


def trl(options: argparse.Namespace) -> dict[str, Any]:
    """TRL's trainer on the same rows: its own loss, accumulation and optimizer."""
    import tempfile

    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(options.threads)
    shape = configuration(options.shape, length=options.sequence_length)
    batch = random_batch(options, shape.vocab_size, torch.device("cpu"))
    before = start_of_peak(options)
    model = random_model(shape, options.precision, torch.device(options.device), options.peer_attention).train()
    examples = []
    for ids, mask, segments in zip(*(batch[name].tolist() for name in COLUMNS), strict=True):
        used = sum(segment > 0 for segment in segments)
        labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
        sizes = [segments.count(number) for number in range(1, max(segments) + 1)]
        examples.append({"input_ids": ids[:used], "labels": labels[:used], "seq_lengths": sizes})
    moments: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if options.device == "cuda":
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    steps = options.warmup + options.steps
    with tempfile.TemporaryDirectory(prefix="bench-trl-") as folder:
        args = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=options.micro_batch_size,
            gradient_accumulation_steps=options.num_micro_batches,
            max_steps=steps,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            gradient_checkpointing=options.activation_checkpointing,
            padding_free=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            logging_steps=steps,
            report_to=[],
            save_strategy="no",
            use_cpu=options.device == "cpu",
            bf16=options.precision == "bf16",
            torch_compile=options.compile,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        lora = LoraConfig(r=options.lora, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(examples * steps),
            processing_class=tokenizer(),
            peft_config=lora if options.lora else None,
            callbacks=[Clock()],
        )
        trainer.train()
    totals = [after - before for before, after in itertools.pairwise(moments)][-options.steps :]
    report = result(options, shape, totals, batch, before)
    del report["memory"]  # the estimate is of another program
    return report


def tokenizer() -> Any:
    """TRL wants one; nothing is tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<pad>")
