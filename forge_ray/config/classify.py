"""`train.method: {kind: classify}`: a head over labels in place of the one over the vocabulary."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config, SettingError

NO_LABEL = "none"  # how a row says that no label of a `multi` target holds
BETWEEN = ", "  # stands between the labels of a `multi` target


class Target(Config):
    """One question about each text. The head has a logit for each label; those of several targets stand side by side."""

    name: str = Field(
        "label", min_length=1, pattern=r"^[^/]*$", description="Name of the target in rows that have several, and in scores"
    )
    labels: tuple[str, ...] = Field(min_length=1, description="Its labels, in the order of the head's logits")
    loss: Literal["single", "multi", "pair"] = Field(
        "single",
        description="`single`: exactly one label holds (softmax); `multi`: any number of them (a sigmoid each). `pair` is"
        " that of {kind: reward}, which has no targets of its own",
    )
    weight: float = Field(1.0, gt=0, description="Weight of its loss among the targets")

    @model_validator(mode="after")
    def _labels_can_be_told_apart(self) -> Self:
        if "" in self.labels:
            raise SettingError(f"target {self.name} has an empty label", "remove it: every row has a text as its label")
        if repeated := [label for number, label in enumerate(self.labels) if label in self.labels[:number]]:
            raise SettingError(f"target {self.name} lists the label {repeated[0]!r} twice", "remove one of them")
        by_form: dict[str, str] = {}
        for label in self.labels:
            if (other := by_form.setdefault(normalise(label), label)) != label:
                raise SettingError(
                    f"the labels {other!r} and {label!r} of target {self.name} are one to the scores: case, white space and"
                    " a final full stop do not count",
                    "write the label in one way in the rows, and list it once",
                )
        if self.loss == "single" and len(self.labels) < 2:
            raise SettingError(
                f"target {self.name} has one label, {self.labels[0]!r}: with loss=single it always holds",
                "list the other labels too, or set loss: multi",
            )
        joined = [label for label in self.labels if BETWEEN in label]
        if self.loss == "multi" and (joined or NO_LABEL in self.labels):
            label = (joined or [NO_LABEL])[0]
            raise SettingError(
                f"target {self.name} with loss=multi cannot have the label {label!r}: rows write several labels with"
                f" {BETWEEN!r} between them, and {NO_LABEL!r} where none of them holds",
                "rename the label in the rows and here",
            )
        return self


class Classify(Config):
    """Training a classifier: the base model with a head over labels, read at the last token of each prompt. Needs
    `data.form: labels`."""

    kind: Literal["classify"] = Field(description="A head over labels is trained, and exported with the model")
    targets: tuple[Target, ...] = Field(min_length=1, description="What is asked of each text")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of each answer's weight that is spread evenly over the labels (arXiv:1512.00567)"
    )
    class_weights: Literal["none", "balanced"] | dict[str, float] = Field(
        "none",
        description="Weight of the rows of each label. `balanced`: rare labels weigh as much as frequent ones; or a mapping"
        " of labels (`target/label` where there are several targets) to weights, 1 for those that it does not name",
    )

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        if any(target.loss == "pair" for target in self.targets):
            raise SettingError("loss=pair is that of a reward model", "use train.method={kind: reward}, without targets")
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise SettingError(f"the targets {names} do not have distinct names", "give each target a name of its own")
        if isinstance(self.class_weights, dict):
            labels = class_names(self.targets)
            if unknown := [name for name in self.class_weights if name not in labels]:
                raise SettingError(
                    f"class_weights names {unknown[0]!r}, which is not one of the labels {list(labels[:8])}",
                    "correct the name",
                )
            if low := [name for name, weight in self.class_weights.items() if weight <= 0]:
                raise SettingError(
                    f"class_weights.{low[0]}={self.class_weights[low[0]]} is not above 0",
                    "leave out rows that should not count",
                )
        return self


class Reward(Config):
    """Training a reward model: the base model with a head of one number, read at the last token of each answer. Needs rows
    of a preferred and a rejected answer."""

    kind: Literal["reward"] = Field(description="The head learns to give the preferred answer of a pair the higher number")


def normalise(text: str) -> str:
    """Case, surrounding white space and a final full stop do not decide whether an answer is right."""
    return " ".join(text.split()).removesuffix(".").casefold()


REWARD = Target(name="reward", labels=("reward",), loss="pair")  # what the head of a reward model is, next to other heads


def class_names(targets: tuple[Target, ...]) -> tuple[str, ...]:
    """Of the head's logits, in order: a label, with its target where there are several; () without a target."""
    if len(targets) == 1:
        return targets[0].labels
    return tuple(f"{target.name}/{label}" for target in targets for label in target.labels)


OF_CLASSIFIERS = frozenset({"average_precision", "ece", "ece_uncalibrated", "temperature"})  # and of no model that writes
OF_ALL_CLASSES = ("macro_f1", "average_precision")  # say nothing of rows of one class
OF_WHOLE_SPLIT = ("temperature", "contamination", "size_bytes")  # no slice has them


def metrics_of(targets: tuple[Target, ...]) -> frozenset[str]:
    """Names of what the evaluation of a classifier with these targets measures."""
    if targets == (REWARD,):
        return frozenset({"pair_accuracy", "reward_margin", "contamination", "size_bytes"})
    names = {"exact_match", "macro_f1", "average_precision", "contamination", "size_bytes"}
    if len(targets) == 1 and targets[0].loss == "single":
        names.add("label_likelihood")
    for target in targets:
        prefix = f"{target.name}_" if len(targets) > 1 else ""
        names |= {f"{prefix}{name}" for name in ("ece", "ece_uncalibrated", "temperature")}
        names |= {f"{prefix}accuracy"} if prefix else set()
    return frozenset(names)


def columns_of(targets: tuple[Target, ...]) -> tuple[slice, ...]:
    """Where the logits of each target stand."""
    ends = [sum(len(target.labels) for target in targets[: number + 1]) for number in range(len(targets))]
    return tuple(slice(end - len(target.labels), end) for end, target in zip(ends, targets, strict=True))
