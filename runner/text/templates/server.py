"""A process that renders tenants' chat templates for foreign.py, each in a fork.

It reads a job in JSON, a line each, and writes a line of JSON: {"text": ...}, or {"failed": the
error's class, "said": what the template itself says}.
"""

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from granatum.runner.text.templates.applied import TemplateFailed, applied
from granatum.runner.text.torchless import import_transformers
from granatum.v1.conversation import Conversation

_CPU_S = 1.0
_MEMORY_BYTES = 256 << 20
"""Beyond what the server itself has."""
_WARM = (
    "{{ messages | tojson }}",
    "{{ raise_exception('x') }}",
    "{{ strftime_now('%c') }}{{ '<a>' | striptags }}{{ lipsum(1) }}",
)
"""Templates that import, and read of the time zone, all that children can no longer open."""
_PATIENCE = 10  # others' tokens come first


def main() -> None:
    """Answer jobs until the standard input ends."""
    import_transformers()
    settings = _settings()
    warm = Conversation([{"role": "user", "content": "x"}], None, None, {}, False, True)
    for template in _WARM:
        with suppress(TemplateFailed):
            applied(settings, warm, {}, chat_template=template)
    for line in sys.stdin.buffer:
        child = os.fork()
        if not child:
            _answer(line, settings)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            _say({"failed": signal.Signals(status & 127).name if status & 127 else "nothing"})


def _settings() -> Any:
    """A tokenizer of transformers without tokens, for its apply_chat_template alone."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def _answer(line: bytes, settings: Any) -> None:
    job = json.loads(line)
    conversation = Conversation(**job["conversation"])
    _limit()
    try:
        text = applied(settings, conversation, job["special"], chat_template=job["template"])
        answer = {"text": text}
    except TemplateFailed as error:
        answer = {"failed": error.kind, "said": error.said}
    signal.setitimer(signal.ITIMER_PROF, 0)  # half an answer would be the worst of answers
    _say(answer)


def _limit() -> None:
    with suppress(OSError):
        os.nice(_PATIENCE)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = own + _MEMORY_BYTES
    for what, limit in (
        (resource.RLIMIT_AS, most),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, _CPU_S)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
