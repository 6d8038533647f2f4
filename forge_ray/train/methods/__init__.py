"""One file per training method, opened when a run file names it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forge_ray.config.classify import Classify, Reward
from forge_ray.config.distil import Distil
from forge_ray.config.method import OF_ANSWERS, Preference
from forge_ray.train.job import TrainJob
from forge_ray.train.method import Method

if TYPE_CHECKING:
    from forge_ray.train.reference import Reference


def method_of(job: TrainJob) -> Method:
    """The method that `train.method` names. It is made before the model is loaded, for it decides the model's head."""
    match job.config.method:
        case "sft":
            from forge_ray.train.methods.sft import sft

            return sft()
        case Preference() as config:
            from forge_ray.train.methods.preference import preference

            return preference(config, reference_of(job))
        case Distil() as config:
            from forge_ray.train.methods.distil import distil

            teacher = reference_of(job)
            assert teacher
            return distil(config, teacher)
        case Reward():
            from forge_ray.train.methods.reward import reward

            return reward(job)
        case Classify() as config:
            from forge_ray.train.methods.classes import classes

            return classes(job, config)


def reference_of(job: TrainJob) -> Reference | None:
    """What the loss reads of a frozen model, the teacher or the reference; None where it reads none."""
    from forge_ray.train.measure import document_logps
    from forge_ray.train.reference import Reference

    config = job.config.method
    if isinstance(config, Distil) and job.frozen:
        from forge_ray.train.frozen import vocabulary
        from forge_ray.train.methods.distil import likeliest

        num_tokens = vocabulary(job.store, job.frozen, job.base)
        return Reference(job, likeliest(config.k, config.temperature, num_tokens))
    if not (isinstance(config, Preference) and config.has_reference):
        return None
    if config.kind == "kto":
        from forge_ray.train.mismatched import logps_with_moved

        return Reference(job, logps_with_moved())
    return Reference(job, document_logps(in_pairs=config.kind not in OF_ANSWERS))
