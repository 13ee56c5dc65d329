"""When a graph is captured, and which one serves a plan. Captures take a fake clock's time."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from step_plans import LIMITS, plans, span

from granatum.runner.engine.execution.executor import _shapes
from granatum.runner.engine.execution.graphs import INTERVAL_S, SHARE, Graphs, covering, holds
from granatum.runner.engine.scheduling.plan import Plan
from granatum.runner.model.inputs import StepShape, decode_shape, mixed_shape

SHAPES = _shapes(LIMITS)


@dataclass
class Device:
    """Captures take `cost_s`; what is captured is told in order."""

    cost_s: float = 0.01
    now: float = 100.0
    fails: Callable[[StepShape], bool] = lambda shape: False
    early: list[StepShape] = field(default_factory=list)
    late: list[StepShape] = field(default_factory=list)

    def capture(self, shape: StepShape) -> StepShape:
        self.now += self.cost_s
        self.early.append(shape)
        return shape

    def capture_later(self, shape: StepShape) -> StepShape:
        if self.fails(shape):
            raise RuntimeError("no room")
        self.now += self.cost_s
        self.late.append(shape)
        return shape

    def graphs(self) -> Graphs[StepShape]:
        return Graphs(self.capture, self.capture_later, SHAPES, lambda: self.now)


def decodes(number: int, slot: int = -1) -> Plan:
    return Plan(tuple(span(seat, slot, 40, 1) for seat in range(number)))


@settings(max_examples=150, deadline=None)
@given(plans())
def test_the_first_graphs_hold_every_plan(plan: Plan) -> None:
    assert any(holds(shape, plan) for shape in covering(SHAPES))


def test_a_start_captures_few_graphs_the_largest_first() -> None:
    device = Device()
    graphs = device.graphs()
    assert set(device.early) == covering(SHAPES)
    assert len(graphs) == 6
    assert len(graphs) + graphs.waiting == len(SHAPES) > 30
    rows = [shape.rows for shape in device.early]
    assert rows == sorted(rows, reverse=True)
    assert device.late == []


def test_the_smallest_captured_shape_serves() -> None:
    graphs = Device().graphs()
    batch, rows = LIMITS.max_batch, LIMITS.prefill_tokens
    assert graphs.shape_for(decodes(1)) == decode_shape(1, lora=False)
    assert graphs.shape_for(decodes(2)) == decode_shape(batch, lora=False)
    assert graphs.shape_for(decodes(2, slot=1)) == decode_shape(batch, lora=True)
    chunk = Plan((), (span(0, 1, 0, 30),))
    assert graphs.shape_for(chunk) == mixed_shape(rows, batch, batch, batch, lora=True)
    while graphs.waiting:
        graphs.capture_next()
    assert graphs.shape_for(decodes(2)) == decode_shape(2, lora=False)
    assert graphs.shape_for(chunk) == mixed_shape(32, 0, batch, batch, lora=True)


def test_an_idle_engine_captures_one_after_another() -> None:
    device = Device()
    graphs = device.graphs()
    while graphs.due(idle=True):
        graphs.capture_next()
    assert set(device.late) | set(device.early) == set(SHAPES)
    assert not graphs.due(idle=False)


def test_the_shape_that_a_plan_lacked_is_captured_first() -> None:
    device = Device()
    graphs = device.graphs()
    graphs.shape_for(decodes(20, slot=1))
    graphs.capture_next()
    assert device.late == [decode_shape(24, lora=True)]
    assert graphs.shape_for(decodes(20, slot=1)) == decode_shape(24, lora=True)
    graphs.capture_next()
    assert device.late[1] == decode_shape(2, lora=False)


def test_under_load_captures_take_a_small_share_of_the_time() -> None:
    device = Device(cost_s=SHARE * INTERVAL_S)
    graphs = device.graphs()
    began = device.now
    while graphs.waiting:
        device.now += 0.01  # a step
        if graphs.due(idle=False):
            before = device.now
            graphs.capture_next()
            assert device.now - before <= SHARE * INTERVAL_S + 1e-9
    spent = len(device.late) * device.cost_s
    assert spent / (device.now - began) <= SHARE


def test_captures_that_take_long_wait_for_an_idle_engine() -> None:
    device = Device(cost_s=SHARE * INTERVAL_S * 1.01)
    graphs = device.graphs()
    device.now += 3600
    assert not graphs.due(idle=False)
    assert graphs.due(idle=True)


def test_a_capture_that_took_long_while_serving_counts() -> None:
    device = Device()
    graphs = device.graphs()
    device.cost_s = 1.0
    graphs.capture_next()
    device.now += 3600
    assert not graphs.due(idle=False)


def test_a_capture_that_fails_is_the_last_and_the_others_serve() -> None:
    device = Device(fails=lambda shape: shape.rows == 4)
    graphs = device.graphs()
    graphs.capture_next()  # of two rows, without adapters
    graphs.capture_next()  # with adapters
    with pytest.raises(RuntimeError, match="no room"):
        graphs.capture_next()
    assert not graphs.due(idle=True)
    assert graphs.shape_for(decodes(2)) == decode_shape(2, lora=False)
    assert graphs.shape_for(decodes(3)) == decode_shape(LIMITS.max_batch, lora=False)
