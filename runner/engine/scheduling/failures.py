"""What a client is told when the engine ends its sequence with an error. No torch."""

from granatum.runner.records import Failure, Submit
from granatum.v1.errors import Internal, InvalidRequest, Overloaded, PreconditionFailed

STEP_FAILED = Failure.of(
    Internal(
        "an internal error ended this request: the runner's log has the details",
        reason="STEP_FAILED",
    )
)


def prompt_length(tokens: int, most: int) -> Failure:
    """The prompt is empty or too long."""
    return Failure.of(
        InvalidRequest(
            f"the prompt has {tokens} tokens and must have 1 to {most}: shorten it",
            reason="PROMPT_LENGTH",
        )
    )


def token_out_of_vocabulary(token: int, vocabulary: int) -> Failure:
    """The model has no such token."""
    return Failure.of(
        InvalidRequest(
            f"token id {token} is not one of the model's 0 to {vocabulary - 1}",
            reason="TOKEN_ID",
            field="token_ids",
        )
    )


def too_large(tokens: int, pages: int, page_tokens: int) -> Failure:
    """The sequence would not fit even if it had all pages to itself."""
    return Failure.of(
        Overloaded(
            f"{tokens} tokens with their adapter do not fit into this runner's {pages} pages of "
            f"{page_tokens} tokens: shorten the request, or give the runner more memory",
            reason="SEQUENCE_TOO_LARGE",
        )
    )


def not_finite(submit: Submit, generated: int) -> Failure:
    """The logits after `generated` tokens are not finite, so that no token can be chosen."""
    return Failure.of(
        PreconditionFailed(
            f"the logits of generated token {generated + 1} are not finite, so that no token can "
            f"be chosen: {_overflowing(submit)}",
            reason="LOGITS_NOT_FINITE",
        )
    )


def _overflowing(submit: Submit) -> str:
    """What may be the cause, and what to do about it."""
    penalties = "bring repetition_penalty closer to 1 and the other penalties closer to 0"
    if submit.adapter is not None and submit.sampling.penalized:
        return f"the adapter's values overflow, then upload it with smaller ones; or {penalties}"
    if submit.adapter is not None:
        return "the adapter's values overflow in this model; upload it with smaller ones"
    if submit.sampling.penalized:
        return f"the penalties overflow, or the base model does; {penalties}"
    return "the base model overflows on this prompt, or stop.token_ids leave it no token to choose"
