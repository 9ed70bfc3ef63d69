"""A step as one CUDA graph: a single launch for the CPU, whatever the GPU then does."""

from collections.abc import Callable

import torch


class Captured:
    """`function`, which takes and returns nothing, as a CUDA graph from the third call on.

    stream: where it is recorded, and run before that; of one model always the same, as autograd ties gradients to streams.
    function: reads and writes only tensors that stay where they are, and asks nothing of the device. Its first two calls run as
    they are: what is compiled, or allocated once and for all, then is. The third is recorded, in memory that the graph keeps, and
    replayed; the later ones are replayed. An error while recording says how to do without.
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
        if self._calls <= self.WARMUP:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._function()
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the thread that loads the next batch pins memory meanwhile, and may
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._function()
        except RuntimeError as error:
            error.add_note("while recording the step as a CUDA graph; --no-capture runs it without one")
            raise
        return graph
