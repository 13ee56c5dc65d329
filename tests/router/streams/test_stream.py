"""Streams through real routers and scripted runners: nothing lost, nothing repeated."""

import asyncio

import grpc
import pytest
from router_box import Answer, Box, whole
from scripted_runner import Script, expected_ids

from granatum.v1.cluster_pb2 import DrainRunnerRequest, ResumeRunnerRequest
from granatum.v1.errors import AlreadyExists, InvalidRequest, Overloaded, Unavailable
from granatum.v1.inference_pb2 import (
    Chat,
    ChatMessage,
    GenerateRequest,
    SamplingParams,
    StopConditions,
)
from granatum.v1.rich_status import from_rpc_error
from granatum.v1.runner_pb2 import SequenceFailure
from granatum.v1.transport import bearer


async def test_a_stream_is_relayed_whole_and_leaves_nothing_behind(box: Box) -> None:
    await box.router()
    await box.runner("a")
    answer = await box.generate("hello", 50)
    whole(box, {"hello": answer}, 50)
    assert answer.responses[0].start.runner_id == "a"
    assert answer.responses[-1].end.runner_id == "a"
    timings = answer.responses[-1].end.timings
    assert 0 < timings.queue_s < timings.first_token_s < timings.total_s
    assert timings.resumptions == 0
    await box.idle()


async def test_the_working_set_grows_on_one_runner_before_another_is_touched(box: Box) -> None:
    await box.router()
    await box.runner("a", max_batch=8)
    await box.runner("b", max_batch=8)
    whole(box, await box.generate_many(8, 30), 30)
    assert (len(box.runners["a"].submissions), len(box.runners["b"].submissions)) == (0, 8)


async def test_a_runner_dies_with_many_streams_open(box: Box) -> None:
    await box.router()
    await box.router()
    for id_ in "abc":
        await box.runner(id_, script=Script(step_s=0.005))
    streams = asyncio.create_task(box.generate_many(24, 60))
    doomed = box.runners["c"]
    async with asyncio.timeout(10):
        while len(doomed.active) < 24 or any(len(a.ids) < 10 for a in doomed.active.values()):
            await asyncio.sleep(0.005)
    await doomed.die()
    answers = await streams
    whole(box, answers, 60)
    assert {answer.resumptions for answer in answers.values()} == {1}
    assert {answer.responses[-1].end.runner_id for answer in answers.values()} == {"b"}
    await box.idle()


async def test_refusals_and_evictions_go_round_until_the_end(box: Box) -> None:
    await box.router()
    await box.runner("a", script=Script(refuse=5, evict_after=7))
    await box.runner("b", script=Script(refuse=3, evict_after=5))
    answers = await box.generate_many(12, 40)
    whole(box, answers, 40)
    assert all(answer.resumptions >= 5 for answer in answers.values())
    assert all(runner.submissions for runner in box.runners.values())
    await box.idle()


async def test_a_moved_chat_goes_on_from_the_prompt_that_its_first_runner_made(box: Box) -> None:
    await box.router()
    for id_ in "ab":
        await box.runner(id_, script=Script(evict_after=3))
    messages = [ChatMessage(role="user", content="what time is it?")]
    request = GenerateRequest(chat=Chat(messages=messages), stop=StopConditions(max_tokens=10))
    call = box.inference().Generate(request, metadata=bearer(box.acme))
    answer = Answer([response async for response in call])
    submissions = [s for runner in box.runners.values() for s in runner.submissions]
    submissions.sort(key=lambda submission: len(submission.generated))
    assert answer.resumptions == 3
    assert submissions[0].request.HasField("chat")
    later = {bytes(s.request.token_ids.ids).decode() for s in submissions[1:]}
    (prompt,) = later
    assert prompt.startswith("chat ")  # the scripted runners number their chats
    assert answer.ids == expected_ids(prompt, 10)
    assert answer.responses[-1].end.usage.prompt_tokens == len(prompt)


async def test_a_sequence_that_made_no_token_is_sent_as_it_came(box: Box) -> None:
    await box.router()
    await box.runner("a", script=Script(refuse=2))
    await box.generate("hello")
    assert [s.request.prompt for s in box.runners["a"].submissions] == ["hello"] * 3


async def test_the_only_runner_may_refuse_and_is_asked_again(box: Box) -> None:
    await box.router()
    await box.runner("a", script=Script(refuse=4))
    answer = await box.generate("hello")
    whole(box, {"hello": answer}, 20)
    assert answer.resumptions == 4


async def test_a_drained_runner_hands_its_streams_over_and_gets_no_more(box: Box) -> None:
    await box.router()
    await box.runner("a", script=Script(step_s=0.005))
    await box.runner("b", script=Script(step_s=0.005))
    streams = asyncio.create_task(box.generate_many(8, 100))
    async with asyncio.timeout(10):
        while len(box.runners["b"].active) < 8:
            await asyncio.sleep(0.005)
    admin = bearer(box.admin)
    await box.cluster().DrainRunner(DrainRunnerRequest(runner_id="b"), metadata=admin)
    answers = await streams
    whole(box, answers, 100)
    assert {answer.responses[-1].end.runner_id for answer in answers.values()} == {"a"}
    await box.cluster().ResumeRunner(ResumeRunnerRequest(runner_id="b"), metadata=admin)
    async with asyncio.timeout(5):
        while (await box.statuses())["b"].runner.draining:
            await asyncio.sleep(0.01)
    assert (await box.generate("later")).responses[0].start.runner_id == "b"


async def test_a_runner_that_falls_silent_is_left_once_its_lease_is_over(box: Box) -> None:
    await box.router(stall_s=0.3)
    await box.runner("a")
    await box.runner("b")
    stalled = box.runners["b"].script
    stalled.stalled = stalled.silent = True
    answer = await box.generate("hello")
    whole(box, {"hello": answer}, 20)
    assert answer.resumptions == 1
    assert answer.responses[-1].end.runner_id == "a"
    assert box.runners["b"].cancelled == 1


async def test_a_slow_runner_that_lives_keeps_its_streams(box: Box) -> None:
    await box.router(stall_s=0.1)
    await box.runner("a", script=Script(stalled=True))
    asyncio.get_running_loop().call_later(0.5, setattr, box.runners["a"].script, "stalled", False)
    answer = await box.generate("hello")
    assert answer.resumptions == 0
    whole(box, {"hello": answer}, 20)


async def test_a_runner_that_never_makes_a_token_is_given_up(box: Box) -> None:
    await box.router(stall_s=0.1, idle_s=0.3)
    await box.runner("a", script=Script(stalled=True))
    error = await box.error_of("hello")
    assert "made no token" in str(error)
    await box.idle()
    assert box.runners["a"].cancelled == 1


async def test_no_runner_is_unavailable_before_the_deadline_with_a_hint(box: Box) -> None:
    await box.router()
    error = await box.error_of("hello", seconds=0.8)
    assert isinstance(error, Unavailable)
    assert error.retry_after_s


async def test_the_only_runner_gone_for_good_is_unavailable_with_a_hint(box: Box) -> None:
    await box.router(patience_s=1.0)
    await box.runner("a", script=Script(step_s=0.01))
    request = GenerateRequest(prompt="hello", stop=StopConditions(max_tokens=500))
    call = box.inference().Generate(request, metadata=bearer(box.acme))
    responses = aiter(call)
    await anext(responses)
    await box.runners["a"].die()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in responses:
            pass
    error = from_rpc_error(caught.value)
    assert isinstance(error, Unavailable)
    assert error.retry_after_s


async def test_a_stream_waits_for_a_runner_to_come(box: Box) -> None:
    await box.router()
    stream = asyncio.create_task(box.generate("hello"))
    async with asyncio.timeout(5):
        while not len(box.routers[0]._admission._line):
            await asyncio.sleep(0.005)
    await box.runner("a")
    whole(box, {"hello": await stream}, 20)


async def test_a_full_fleet_queues_to_its_bound_and_then_refuses(box: Box) -> None:
    await box.router(max_queue=3)
    await box.runner("a", max_batch=2, script=Script(step_s=0.005))
    done = await asyncio.gather(
        *(box.generate(f"prompt {n}", 40) for n in range(8)), return_exceptions=True
    )
    errors = [from_rpc_error(e) for e in done if isinstance(e, grpc.aio.AioRpcError)]
    assert len(errors) == 3
    assert all(isinstance(e, Overloaded) and e.retry_after_s for e in errors)
    assert box.runners["a"].peak == 2
    await box.idle()


async def test_a_place_that_does_not_come_free_in_time_is_overload(box: Box) -> None:
    await box.router()
    await box.runner("a", max_batch=1, script=Script(step_s=0.01))
    holder = asyncio.create_task(box.generate("long", 150))
    async with asyncio.timeout(5):
        while not box.runners["a"].active:
            await asyncio.sleep(0.005)
    error = await box.error_of("late", seconds=0.6)
    assert isinstance(error, Overloaded)
    assert error.reason == "QUEUE_TIMEOUT"
    whole(box, {"long": await holder}, 150)


async def test_many_streams_through_two_routers_wait_their_turn(box: Box) -> None:
    await box.router()
    await box.router()
    for id_ in "ab":
        await box.runner(id_, max_batch=5)
    answers = await box.generate_many(60, 10)
    whole(box, answers, 10)
    assert [box.runners[id_].peak for id_ in "ab"] == [5, 5]


@pytest.mark.parametrize("moment", ["running", "unread", "stalled", "waiting"])
async def test_a_client_that_leaves_frees_what_it_held(box: Box, moment: str) -> None:
    await box.router()
    if moment != "waiting":
        burst = 100 if moment == "unread" else 1  # more than the connection takes without a reader
        await box.runner("a", script=Script(step_s=0.005, stalled=moment == "stalled", burst=burst))
    request = GenerateRequest(
        prompt="hello", request_id="mine", stop=StopConditions(max_tokens=1_000_000)
    )
    stub = box.inference()
    call = stub.Generate(request, metadata=bearer(box.acme))
    if moment == "running":
        await call.read()
    else:
        await asyncio.sleep(0.2)
    call.cancel()
    if moment != "waiting":
        await box.idle()
        assert box.runners["a"].cancelled == 1
        box.runners["a"].script.stalled = False
    else:
        await box.runner("a")
    async with asyncio.timeout(5):
        while True:  # until the request's id is free again
            request.stop.max_tokens = 3
            again = stub.Generate(request, metadata=bearer(box.acme))
            try:
                assert [r async for r in again]
                break
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    raise


async def test_a_request_id_runs_once_per_tenant_over_all_routers(box: Box) -> None:
    other = box.tenant("globex")
    await box.router()
    await box.router()
    await box.runner("a", script=Script(step_s=0.01))
    request = GenerateRequest(
        prompt="hello", request_id="order-7", stop=StopConditions(max_tokens=50)
    )
    first = aiter(box.inference(0).Generate(request, metadata=bearer(box.acme)))
    start = await anext(first)
    assert start.start.request_id == "order-7"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await box.inference(1).Generate(request, metadata=bearer(box.acme)).read()
    taken = from_rpc_error(caught.value)
    assert isinstance(taken, AlreadyExists)
    assert taken.retry_after_s
    second = box.inference(1).Generate(request, metadata=bearer(other))
    assert len(Answer([r async for r in second]).ids) == 50
    assert len([r async for r in first])
    again = box.inference(1).Generate(request, metadata=bearer(box.acme))
    assert len(Answer([r async for r in again]).ids) == 50


async def test_the_seed_follows_tenant_and_request_id_unless_given(box: Box) -> None:
    other = box.tenant("globex")
    await box.router()
    runner = await box.runner("a")

    async def seed(key: str, request_id: str, sampling: SamplingParams | None = None) -> int:
        stop = StopConditions(max_tokens=1)
        request = GenerateRequest(
            prompt="x", request_id=request_id, sampling=sampling, stop=stop, adapter=""
        )
        call = box.inference().Generate(request, metadata=bearer(key))
        assert [r async for r in call]
        sent = runner.submissions[-1].request
        assert sent.sampling.HasField("seed")
        assert not sent.request_id
        return sent.sampling.seed

    one = await seed(box.acme, "one")
    assert one == await seed(box.acme, "one", SamplingParams(temperature=0.5))
    assert len({one, await seed(box.acme, "two"), await seed(other, "one")}) == 3
    assert await seed(box.acme, "one", SamplingParams(seed=0)) == 0
    assert await seed(box.acme, "") != await seed(box.acme, "")


async def test_a_runners_verdict_reaches_the_client(box: Box) -> None:
    await box.router()
    runner = await box.runner("a")
    runner.script.fail = SequenceFailure(code=3, message="the prompt is too long", reason="LONG")
    error = await box.error_of("hello")
    assert isinstance(error, InvalidRequest)
    assert (error.message, error.reason) == ("the prompt is too long", "LONG")
    runner.script.fail = SequenceFailure(code=14, message="no adapter", reason="STORE_AWAY")
    error = await box.error_of("hello")
    assert isinstance(error, Unavailable)
    assert error.retry_after_s
    await box.idle()


async def test_a_request_that_brings_down_runner_after_runner_is_not_tried_for_ever(
    box: Box,
) -> None:
    await box.router()
    for id_ in "abcdef":
        await box.runner(id_, script=Script(stalled=True))
    stream = asyncio.create_task(box.generate("poison"))
    died = 0
    while not stream.done():
        for runner in box.runners.values():
            if runner.active:
                await runner.die()
                runner.active.clear()
                died += 1
        await asyncio.sleep(0.01)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream
    assert from_rpc_error(caught.value).reason == "RUNNERS_LOST"
    assert died == 4


async def test_tokens_that_pile_up_come_together(box: Box) -> None:
    await box.router()
    await box.runner("a", script=Script(burst=8))
    answer = await box.generate("hello", 60)
    whole(box, {"hello": answer}, 60)
    assert [len(response.tokens) for response in answer.responses] == [8] * 7 + [4]
