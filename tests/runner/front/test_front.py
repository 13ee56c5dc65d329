"""Sessions over a real gRPC server, with an engine that the test plays over a real channel."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from front_rig import BOS, READY, Runner, asks, outputs, started, submission

from granatum.examples.tokenizer import byte_tokenizer
from granatum.runner.records import Departure, Failure, Finish, SequenceNews
from granatum.runner.text.tokenizer import Tokenizer
from granatum.v1 import inference_pb2, runner_pb2
from granatum.v1.errors import Code
from granatum.v1.inference_pb2 import (
    Chat,
    ChatMessage,
    GenerateRequest,
    LogprobOptions,
    SamplingParams,
    StopConditions,
    TokenIds,
)
from granatum.v1.runner_pb2 import CancelSequence, SessionRequest


async def test_prompt_goes_to_the_engine_and_tokens_come_back(runner: Runner) -> None:
    stream = runner.session()
    await stream.write(
        submission(
            7,
            asks(
                "hi",
                sampling=SamplingParams(temperature=0.5, seed=2**64 - 1),
                stop=StopConditions(token_ids=[5], min_tokens=2),
                logprobs=LogprobOptions(top=3),
                priority=-1,
            ),
            adapter_digest="sha256:" + "ab" * 32,
        )
    )
    submit = await runner.submitted()
    assert submit.prompt == (BOS, *b"hi")
    assert submit.adapter == "ab" * 32
    assert (submit.sampling.temperature, submit.sampling.seed) == (0.5, 2**64 - 1)
    assert submit.stop_ids == {5, 258}
    assert (submit.max_tokens, submit.min_tokens) == (256 - 3, 2)
    assert (submit.top_logprobs, submit.priority) == (3, -1)
    runner.report(SequenceNews(submit.sequence_id, tuple(b"a")))
    (first,) = await outputs(stream)
    assert (first.sequence_id, first.prompt_tokens, first.tokens[0].text) == (7, 3, "a")
    runner.report(SequenceNews(submit.sequence_id, (258,), outcome=Finish.STOP))
    (last,) = await outputs(stream)
    assert (last.tokens[0].id, last.tokens[0].text, last.prompt_tokens) == (258, "", 0)
    assert last.finished == inference_pb2.FINISH_REASON_STOP


async def test_adapters_on_the_device_are_as_last_told(runner: Runner) -> None:
    stream = runner.session()
    await stream.write(submission(1, asks()))
    submit = await runner.submitted()
    runner.report(resident=("a", "b"))
    runner.report(SequenceNews(submit.sequence_id, (65,)))
    await outputs(stream)
    assert runner.front.resident == ("a", "b")


async def test_one_message_carries_a_step_of_all_of_a_router(runner: Runner) -> None:
    one, other = runner.session(), runner.session()
    ids = []
    for stream, number in ((one, 1), (one, 2), (other, 1)):
        await stream.write(submission(number, asks()))
        ids.append((await runner.submitted()).sequence_id)
    runner.report(*(SequenceNews(engine_id, (65,)) for engine_id in ids))
    assert [output.sequence_id for output in await outputs(one)] == [1, 2]
    assert [output.sequence_id for output in await outputs(other)] == [1]


async def test_news_merge_while_a_write_is_in_flight(tokenizer: Tokenizer) -> None:
    """Played without a server: what is taken between two responses comes as one."""
    async with started(tokenizer) as runner:
        runner.engine.send(READY)
        await runner.front.loaded.wait()
        session = runner.front.open()
        commands: asyncio.Queue[SessionRequest] = asyncio.Queue()

        async def feed() -> AsyncIterator[SessionRequest]:
            while True:
                yield await commands.get()

        follow = asyncio.create_task(session.follow(feed()))
        commands.put_nowait(submission(1, asks()))
        engine_id = (await runner.submitted()).sequence_id
        responses = session.responses()
        session.take(SequenceNews(engine_id, tuple(b"a")))
        first = await anext(responses)
        for byte in b"bc":
            session.take(SequenceNews(engine_id, (byte,)))
        session.take(SequenceNews(engine_id, tuple(b"d"), outcome=Finish.LENGTH))
        second = await anext(responses)
        follow.cancel()
        assert [t.text for t in first.outputs[0].tokens] == ["a"]
        assert [t.text for t in second.outputs[0].tokens] == ["b", "c", "d"]
        assert second.outputs[0].finished == inference_pb2.FINISH_REASON_LENGTH


async def test_stop_string_ends_the_stream_and_frees_the_engine(runner: Runner) -> None:
    stream = runner.session()
    await stream.write(submission(1, asks(stop=StopConditions(strings=["END"]))))
    engine_id = (await runner.submitted()).sequence_id
    runner.report(SequenceNews(engine_id, tuple(b"aEN")))
    (first,) = await outputs(stream)
    assert "".join(token.text for token in first.tokens) == "a"
    runner.report(SequenceNews(engine_id, tuple(b"D")))
    (last,) = await outputs(stream)
    assert last.finished == inference_pb2.FINISH_REASON_STOP
    assert [(token.id, token.text) for token in last.tokens] == [(ord("D"), "")]
    assert await runner.cancelled() == engine_id


async def test_resumed_stream_goes_on_with_its_half_stop_string(runner: Runner) -> None:
    stream = runner.session()
    request = asks(stop=StopConditions(strings=["END"], max_tokens=9))
    await stream.write(submission(1, request, generated=list(b"aEN"), text_delivered=1))
    submit = await runner.submitted()
    assert (submit.generated, submit.max_tokens) == (tuple(b"aEN"), 9)
    runner.report(SequenceNews(submit.sequence_id, tuple(b"x")))
    (output,) = await outputs(stream)
    assert [token.text for token in output.tokens] == ["ENx"]


async def test_departures_and_failures_are_told(runner: Runner) -> None:
    stream = runner.session()
    outcomes: list[Departure | Failure] = [
        Departure.REFUSED,
        Departure.EVICTED,
        Departure.DRAINED,
        Failure(Code.UNAVAILABLE, "away", "GONE"),
    ]
    for number, outcome in enumerate(outcomes):
        await stream.write(submission(number, asks()))
        runner.report(SequenceNews((await runner.submitted()).sequence_id, outcome=outcome))
        (output,) = await outputs(stream)
        assert output.prompt_tokens == 3
        if isinstance(outcome, Failure):
            failed = output.failed
            assert (failed.code, failed.message, failed.reason) == (14, "away", "GONE")
        else:
            expected = f"DEPARTURE_{outcome.name}"
            assert runner_pb2.Departure.Name(output.departed) == expected


async def test_cancellation_reaches_the_engine(runner: Runner) -> None:
    stream = runner.session()
    await stream.write(submission(1, asks()))
    engine_id = (await runner.submitted()).sequence_id
    await stream.write(SessionRequest(cancel=CancelSequence(sequence_id=1)))
    assert await runner.cancelled() == engine_id


def bad_requests() -> dict[str, tuple[GenerateRequest, str]]:
    penalty = SamplingParams(presence_penalty=3)
    return {
        "no input": (GenerateRequest(), "prompt"),
        "no tokens": (GenerateRequest(token_ids=TokenIds()), "token_ids.ids"),
        "too long": (asks("x" * 300), "301 tokens"),
        "exactly too long": (asks("x" * 255), "at most 255"),
        "token id": (GenerateRequest(token_ids=TokenIds(ids=[1, 259])), "259"),
        "top_p": (asks(sampling=SamplingParams(top_p=0)), "sampling.top_p"),
        "temperature": (asks(sampling=SamplingParams(temperature=float("nan"))), "temperature"),
        "min_p": (asks(sampling=SamplingParams(min_p=1.5)), "sampling.min_p"),
        "penalty": (asks(sampling=penalty), "presence_penalty"),
        "repetition": (asks(sampling=SamplingParams(repetition_penalty=0)), "repetition"),
        "max_tokens": (asks(stop=StopConditions(max_tokens=0)), "stop.max_tokens"),
        "min_tokens": (asks(stop=StopConditions(max_tokens=2, min_tokens=3)), "min_tokens"),
        "stop string": (asks(stop=StopConditions(strings=[""])), "stop.strings"),
        "logprobs": (asks(logprobs=LogprobOptions(top=21)), "logprobs.top"),
        "chat": (GenerateRequest(chat=Chat()), "chat.messages"),
    }


@pytest.mark.parametrize("name", bad_requests())
async def test_bad_requests_name_their_field(runner: Runner, name: str) -> None:
    request, message = bad_requests()[name]
    stream = runner.session()
    await stream.write(submission(1, request))
    (output,) = await outputs(stream)
    assert output.failed.code == Code.INVALID_ARGUMENT
    assert message in output.failed.message


async def test_chat_goes_through_the_models_template(runner: Runner) -> None:
    stream = runner.session()
    chat = Chat(messages=[ChatMessage(role="user", content="yo")])
    await stream.write(
        submission(1, GenerateRequest(chat=chat, stop=StopConditions(ignore_eos=True)))
    )
    submit = await runner.submitted()
    assert submit.prompt == (BOS, *b"yo>")
    assert submit.stop_ids == frozenset()


async def test_a_moved_chat_goes_on_from_the_prompt_that_was_made_first(tmp_path: Path) -> None:
    made = byte_tokenizer()
    made.chat_template = "{{ strftime_now('%H:%M:%S.%f') }} {{ messages[0].content }}"
    made.save_pretrained(tmp_path)
    chat = Chat(messages=[ChatMessage(role="user", content="now?")])
    request = GenerateRequest(chat=chat, stop=StopConditions(max_tokens=4, strings=["xyz"]))
    async with started(Tokenizer(tmp_path)) as runner:
        runner.engine.send(READY)
        await runner.front.loaded.wait()
        stream = runner.session()
        await stream.write(submission(1, request))
        first = await runner.submitted()
        runner.report(SequenceNews(first.sequence_id, tokens=(ord("x"),)))
        (output,) = await outputs(stream)
        assert tuple(output.prompt.ids) == first.prompt
        assert output.prompt_tokens == len(first.prompt)
        runner.report(SequenceNews(first.sequence_id, tokens=(ord("y"),)))
        (more,) = await outputs(stream)
        assert not more.HasField("prompt")
        request.token_ids.CopyFrom(output.prompt)
        await stream.write(submission(2, request, generated=[ord("x"), ord("y")]))
        second = await runner.submitted()
        assert second.prompt == first.prompt
        assert second.generated == (ord("x"), ord("y"))
        runner.report(SequenceNews(second.sequence_id, tokens=(ord("z"),)))
        (stopped,) = await outputs(stream)
        assert stopped.finished == inference_pb2.FINISH_REASON_STOP
        assert not stopped.HasField("prompt")  # the router has it
