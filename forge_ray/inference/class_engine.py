"""The engine of a classifier version: groups of texts in, logits out, one forward pass a text (torch on first use).

A thread takes the groups that wait, callers in turn, as many into one pass as `max_batch_tokens` allows with their padding:
texts of several requests share a pass, and many of one caller do not keep another's waiting.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from forge_ray.errors import EngineError
from forge_ray.inference.classifier import Classifier, Logits, logits_of_pass
from forge_ray.inference.engine import EngineHealth

GroupLogits = Future[Logits]
FAILURES = 3  # passes in a row after which a replica should start again
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """Texts of one request that share a pass; `logits` [n, C] of them."""

    documents: tuple[tuple[int, ...], ...]
    logits: GroupLogits


class ClassEngine:
    """A classifier that answers many requests. `max_request_tokens`: of one text."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.max_request_tokens = classifier.max_text_tokens
        self.max_batch_tokens = classifier.max_batch_tokens
        self._waiting: OrderedDict[str, deque[Group]] = OrderedDict()  # by caller, whose turn it is first
        self._running: list[Group] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._num_failed = 0  # passes in a row
        self._thread = threading.Thread(target=self._run, name="classifier", daemon=True)
        self._thread.start()

    def submit(self, documents: Sequence[tuple[int, ...]], caller: str = "") -> GroupLogits:
        """Logits [n, C] of texts that one pass can take; cancelling what has not begun takes it out of the queue."""
        group = Group(tuple(documents), Future())
        with self._changed:
            if self._is_closed:
                raise EngineError("the classifier's engine is closed", hint="send the request again")
            self._waiting.setdefault(caller, deque()).append(group)
            self._changed.notify()
        return group.logits

    def health(self) -> EngineHealth:
        """Groups that run and wait, and the tokens of their texts."""
        with self._changed:
            running = list(self._running)
            waiting = [group for own in self._waiting.values() for group in own if not group.logits.cancelled()]
        tokens = sum(len(ids) for group in (*running, *waiting) for ids in group.documents)
        is_ok = self._num_failed < FAILURES
        detail = "idle" if is_ok else f"the last {self._num_failed} forward passes of a classifier failed"
        return EngineHealth(is_ok, detail, len(running), len(waiting), tokens)

    def close(self) -> None:
        """End after the pass that runs; what waits fails."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while groups := self._next():
            try:
                logits = logits_of_pass(self.classifier, [ids for group in groups for ids in group.documents])
            except Exception as error:  # of these texts; later ones may pass
                LOG.exception("a forward pass of a classifier failed")
                self._num_failed += 1
                failure = EngineError(f"the classifier failed: {type(error).__name__}", hint="see the replica's log")
                failure.__cause__ = error
                for group in groups:
                    group.logits.set_exception(failure)
            else:
                start, self._num_failed = 0, 0
                for group in groups:
                    end = start + len(group.documents)
                    group.logits.set_result(logits[start:end])
                    start = end
            with self._changed:
                self._running = []

    def _next(self) -> list[Group]:
        """The groups of the next pass, at least one; none once the engine is closed."""
        with self._changed:
            groups: list[Group] = []
            while not groups:  # all that waited may have been cancelled
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    self._fail_waiting()
                    return []
                groups = self._pass_of_waiting()
            self._running = groups
            return groups

    def _fail_waiting(self) -> None:
        for group in (group for own in self._waiting.values() for group in own):
            if group.logits.set_running_or_notify_cancel():
                group.logits.set_exception(EngineError("the engine was closed", hint="send the request again"))
        self._waiting.clear()

    def _pass_of_waiting(self) -> list[Group]:
        """As many of the groups that wait as one pass takes, callers in turn; those that were cancelled are dropped."""
        num_texts, longest = 0, 0
        groups: list[Group] = []
        while self._waiting:
            caller, own = next(iter(self._waiting.items()))
            if own[0].logits.cancelled():
                self._take(caller)
                continue
            num_texts += len(own[0].documents)
            longest = max(longest, *map(len, own[0].documents))
            if groups and num_texts * longest > self.max_batch_tokens:
                break
            group = self._take(caller)
            if group.logits.set_running_or_notify_cancel():
                groups.append(group)
        return groups

    def _take(self, caller: str) -> Group:
        """The caller's first group; another caller is next."""
        own = self._waiting.pop(caller)
        group = own.popleft()
        if own:
            self._waiting[caller] = own
        return group
