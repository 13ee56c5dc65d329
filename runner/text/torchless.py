"""transformers without torch.

We need its configurations and tokenizers alone, yet wherever torch is installed it imports that
and much around it: seconds of every start, and hundreds of megabytes in a front that computes
nothing.
"""

import os
import sys


def import_transformers() -> None:
    """Import transformers so that it takes torch for missing, now and later in this process.

    For our own processes, first thing: where torch is imported already, nothing can be saved, and
    transformers stays whole. torch itself can be imported afterwards.
    """
    if "torch" in sys.modules:
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss torch aloud
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread for each text
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from transformers import AutoConfig, AutoTokenizer  # noqa: F401 - they ask for torch once
    finally:
        del sys.modules["torch"]
