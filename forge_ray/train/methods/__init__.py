"""One file per training method, opened when a run file names it."""

from __future__ import annotations

from forge_ray.config.classify import Classify, Reward
from forge_ray.config.method import Preference
from forge_ray.train.job import TrainJob
from forge_ray.train.method import Method


def method_of(job: TrainJob) -> Method:
    """The method that `train.method` names. It is made before the model is loaded, for it decides the model's head."""
    match job.config.method:
        case "sft":
            from forge_ray.train.methods.sft import sft

            return sft()
        case Preference() as config:
            from forge_ray.train.methods.preference import preference
            from forge_ray.train.reference import Reference

            return preference(config, Reference(job) if config.has_reference else None)
        case Reward():
            from forge_ray.train.methods.reward import reward

            return reward(job)
        case Classify() as config:
            from forge_ray.train.methods.classes import classes

            return classes(job, config)
