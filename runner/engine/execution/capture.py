"""Captures steps as CUDA graphs.

Graphs are captured while the engine serves. Why that is safe:

- The engine's thread captures between two steps, when no step is in flight. A capture runs no
  kernel, so it writes neither to the arena nor to the buffers of inputs and tokens.
- Every kernel was compiled and loaded before, by the executor. Only a launch outside a capture can
  compile. Such launches happen at start-up, when the inputs are padding, and kernels write no KV
  for padding.
- All graphs share one pool of memory. No two graphs ever run at once, so one graph's intermediate
  values may lie where another graph's lie. The largest graphs are captured first; the later ones
  find room in their memory. All write their logits to one buffer of the model's.
- A copy of an adapter may run on a stream of its own. The capture has the mode `thread_local`, in
  which what other threads ask of the device cannot spoil it.
- A capture that finds little free memory is refused, so that no step runs out of memory later.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from granatum.runner.model.inputs import DeviceInputs, Step, StepShape

ROOM = 2
"""Free memory that a capture must find, in multiples of what the largest capture took."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A step of one shape, run by one launch."""

    _graph: torch.cuda.CUDAGraph
    _logits: torch.Tensor

    def replay(self) -> torch.Tensor:
        """Run the step on the current stream; its logits hold until a graph is replayed again."""
        self._graph.replay()
        return self._logits


class NoRoom(Exception):
    """The device has too little free memory for another graph."""


class Capturer:
    """Makes graphs of the steps that `compute` launches on `inputs`; `compute` returns logits."""

    def __init__(self, compute: Callable[[Step], torch.Tensor], inputs: DeviceInputs) -> None:
        self._compute = compute
        self._inputs = inputs
        self._pool = torch.cuda.graph_pool_handle()
        self._largest = 0

    def capture(self, shape: StepShape) -> Graph:
        """The graph of a step of `shape`."""
        step = self._inputs.view(shape)
        free = _free_bytes()
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        # The outer block restores the current stream, also after a capture that failed.
        with torch.cuda.stream(torch.cuda.current_stream()), recording:
            logits = self._compute(step)
        self._largest = max(self._largest, free - _free_bytes())
        return Graph(graph, logits)

    def capture_if_room(self, shape: StepShape) -> Graph:
        """The same, of an engine that serves.

        Raises:
            NoRoom: the device has too little free memory.
        """
        if (free := _free_bytes()) < ROOM * self._largest:
            raise NoRoom(f"{free} bytes are free, and a graph took {self._largest}")
        return self.capture(shape)


def _free_bytes() -> int:
    """Bytes that the device has left, once PyTorch has given back what it does not use."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
