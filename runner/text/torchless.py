"""transformers without torch.

We need only configurations and tokenizers of transformers. Where torch is installed, transformers
imports torch and much around it. That would cost seconds of every start, and hundreds of megabytes
in a front that computes nothing.
"""

import os
import sys


def import_transformers() -> None:
    """Import transformers in such a way that it takes torch for missing as long as we run.

    Our processes call this before they import anything large. Where torch is already imported,
    nothing can be saved and transformers is left as it is. torch can be imported afterwards.
    """
    if "torch" in sys.modules:
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss torch aloud
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread for each text
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from transformers import (  # noqa: F401 - they ask for torch once
            AutoConfig,
            PreTrainedTokenizerFast,
        )
    finally:
        del sys.modules["torch"]
