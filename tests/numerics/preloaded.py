"""What a training worker imports, imported once by the process from which the workers are forked. No threads start here."""

from __future__ import annotations

import gc
import os

from forge_ray.machine.environment import code_commit, code_digest, installed
from forge_ray.train import loop  # noqa: F401
from forge_ray.train.zero import import_deepspeed

os.environ |= {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
import_deepspeed()
for find in (installed, code_digest, code_commit):  # what a process finds once; a fork has it
    find()

import deepspeed  # noqa: E402
import deepspeed.runtime.zero.muon.original_muon  # noqa: E402, F401  (torch's compiler: a second in each worker otherwise)
import peft  # noqa: E402, F401
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: E402, F401
from transformers.integrations.deepspeed import HfDeepSpeedConfig  # noqa: E402, F401

gc.collect()
gc.freeze()  # ZeRO-3 collects garbage when it starts: without these objects that takes a moment, not half a second
