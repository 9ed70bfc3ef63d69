"""A training step recorded as one CUDA graph, so that the CPU launches it with a single call."""

import gc
import sys
from collections.abc import Callable

import torch


class Captured:
    """A function that is recorded as a CUDA graph and replayed from then on.

    The first two calls run the function as it is: they compile what `torch.compile` compiles and allocate what is allocated
    once. The third call records it and replays the recording, and so do all later calls replay it. The graph keeps the memory
    that the recording used.

    function: takes and returns nothing. It reads and writes only tensors that stay where they are, and never waits for the GPU.
    stream: where the function runs and is recorded. All functions of one model share a stream, because autograd runs the backward
    pass on the stream that the forward pass ran on.

    Where the third call cannot record the function, it says on stderr in one line what the reason was. Recording launches
    nothing on the GPU, so the function has not run: it runs then as it is, in this call and in all later ones.
    """

    WARMUP = 2

    def __init__(self, function: Callable[[], None], stream: torch.cuda.Stream):
        self._function = function
        self._stream = stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self) -> None:
        """Run the function once."""
        self._calls += 1
        if self._calls == self.WARMUP + 1:
            self._graph = self._record()
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()

    def _run(self) -> None:
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            self._function()
        outside.wait_stream(self._stream)

    def _record(self) -> torch.cuda.CUDAGraph | None:
        """The function as a graph; None, and a line on stderr, where that fails."""
        graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # A collection may destroy another graph, and CUDA allows that at any time but while it records.
        collects = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            # thread_local: the thread that loads the next batch allocates pinned memory meanwhile, which CUDA forbids globally.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._function()
        except RuntimeError as error:
            torch.cuda.set_stream(outside)  # which torch.cuda.graph leaves undone when it fails
            print(f"the step runs without a CUDA graph, as with --no-capture: {_cause(error)}", file=sys.stderr)
            return None
        finally:
            if collects:
                gc.enable()
        return graph


def _cause(error: BaseException) -> str:
    """The first line of the first error: after it, ending the recording fails too, and hides it."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]
