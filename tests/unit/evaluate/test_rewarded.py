"""What an evaluation of a model with a head refuses: it writes no text, so that nothing asked of texts is left out in
silence."""

from __future__ import annotations

from typing import Any

import pytest

from forge_ray.config.classify import REWARD, Target
from forge_ray.config.measurements import GeneralConfig, KlConfig
from forge_ray.config.release import EvalConfig
from forge_ray.errors import ConfigError
from forge_ray.evaluate.classified import classify_rows
from forge_ray.evaluate.examples import HeldOutRows
from forge_ray.evaluate.rewarded import reward_rows
from forge_ray.evaluate.scoring_files import ScoringFiles
from forge_ray.inference.classifier import Classifier

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "config"),
    [("kl", EvalConfig(kl=KlConfig())), ("general", EvalConfig(general=GeneralConfig(rows="chats")))],
)
def test_what_asks_for_text_is_refused_by_name(name: str, config: EvalConfig) -> None:
    nothing: Any = None
    rows, files = HeldOutRows((), ()), ScoringFiles()
    labels = Classifier(nothing, nothing, (Target(labels=("a", "b")),), 8)
    reward = Classifier(nothing, nothing, (REWARD,), 8)
    for scoring in (
        classify_rows(nothing, nothing, rows, labels, config, files),
        reward_rows(rows, reward, config, files),
    ):
        with pytest.raises(ConfigError, match=f"eval.{name} asks for text") as caught:
            next(scoring)
        assert caught.value.hint == f"remove eval.{name}"
