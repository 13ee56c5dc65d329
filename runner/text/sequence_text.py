"""A sequence's tokens as its client gets them: text, stop strings, log probabilities."""

from collections.abc import Iterable, Sequence

from granatum.runner.records import Finish, Submit, TokenLogprobs
from granatum.runner.text.detokenizer import Detokenizer
from granatum.runner.text.stop_strings import StopStrings
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1.inference_pb2 import Logprob, Token, TopLogprob


class SequenceText:
    """Makes a sequence's tokens into what its client gets.

    `submit.generated` are tokens of other runners. They are made text again here, so that half a
    character or half a stop string at their end goes on as it would have. The client already has
    the first `delivered` characters of all text, and gets what follows.
    """

    def __init__(
        self, tokenizer: Tokenizer, submit: Submit, stop_strings: Sequence[str], delivered: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._submit = submit
        self._detokenizer = Detokenizer(tokenizer, submit.prompt)
        self._stops = StopStrings(stop_strings, tokenizer.special_tokens)
        self._made = 0
        self.stopped = False
        """Whether a stop string has appeared; no text goes out after it."""
        text = "".join([self._push(token) for token in submit.generated])
        self._owed = text[delivered:]  # goes out with the next token
        self._ahead = max(delivered - len(text), 0)  # characters still to come that the client has

    def take(
        self,
        tokens: Iterable[int],
        logprobs: Sequence[TokenLogprobs] = (),
        finish: Finish | None = None,
    ) -> list[Token]:
        """A step's tokens for the client; with `finish`, they are the sequence's last.

        Tokens after a stop string are left out. Text that is still kept goes out with the last
        token. Without tokens, which happens where another runner made the last one, nothing goes
        out: that runner delivered the kept text.
        """
        taken: list[Token] = []
        ids = list(tokens)
        for i, token in enumerate(ids):
            if self.stopped:
                break
            ends = finish is Finish.STOP and i == len(ids) - 1
            text = self._flush(token) if ends else self._push(token)
            message = Token(id=token, text=self._undelivered(text))
            if logprobs:
                message.logprob.CopyFrom(self._logprob(logprobs[i]))
            taken.append(message)
        if finish is Finish.LENGTH and not self.stopped:
            rest = self._undelivered(self._flush())
            if taken:
                taken[-1].text += rest
        return taken

    def _push(self, token: int) -> str:
        self._made += 1
        if self.stopped:
            return ""
        text = self._detokenizer.push(token)
        may_stop = self._made >= self._submit.min_tokens
        text, self.stopped = self._stops.push(text, token, may_stop=may_stop)
        return text

    def _flush(self, last: int | None = None) -> str:
        """The text still kept before the `last` token, which has no text.

        Half a character, or the last token, may complete a stop string, which ends the text.
        """
        text, self.stopped = self._stops.push(self._detokenizer.flush(), last)
        return text if self.stopped else text + self._stops.flush()

    def _undelivered(self, text: str) -> str:
        text, self._owed = self._owed + text, ""
        skipped, self._ahead = min(self._ahead, len(text)), max(self._ahead - len(text), 0)
        return text[skipped:]

    def _logprob(self, entry: TokenLogprobs) -> Logprob:
        top = [
            TopLogprob(id=token, value=value, text=self._tokenizer.token_text(token))
            for token, value in entry.top
        ]
        return Logprob(value=entry.chosen, top=top)
