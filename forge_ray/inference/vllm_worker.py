"""vLLM's engine core ends with the process that started it (imports nothing of vLLM).

The engine core is a child process that holds the weights. vLLM ends it when its parent shuts down, not when the parent is
killed: it would stay forever, with the memory and the GPU. vLLM imports this module in that process, before it loads the
weights, because `worker_extension_cls` names the class here; in any other process importing it does nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.process import BaseProcess


class EndsWithParent:
    """Adds nothing to vLLM's worker."""


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


_parent = multiprocessing.parent_process()
if _parent is not None:
    threading.Thread(target=_end_with, args=(_parent,), name="end-with-parent", daemon=True).start()
