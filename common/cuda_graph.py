"""Capturing work on a GPU as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class CaptureError(RuntimeError):
    """No graph can hold the work; says why."""


class GraphMemory(NamedTuple):
    """What graphs that are never needed at the same time share.

    The allocator gives memory out again only to the stream it was for, so that the stream goes with the pool.
    """

    pool: Any
    stream: torch.cuda.Stream


def graph_memory(device: torch.device) -> GraphMemory:
    return GraphMemory(
        torch.cuda.graph_pool_handle(),
        torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
    )


def capture(
    work: Callable[[], T], device: torch.device, warm_ups: int = 3, memory: GraphMemory | None = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Return ``work``, done on ``device``, as a graph, and what it returned, which each replay overwrites.

    ``work`` is done ``warm_ups`` times before that, as libraries choose and compile at first use, which must
    not happen during a capture. Other threads may copy on the GPU meanwhile, not multiply: the workspaces of
    their products are cleared, too.

    Of graphs with the same ``memory`` a replay of any overwrites what the others returned.

    Raises:
        CaptureError: ``work`` does what a graph cannot hold, such as waiting for the GPU, or there is no
            memory left for it.
    """
    with torch.cuda.device(device):
        pool, stream = memory or graph_memory(device)
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                work()
        current.wait_stream(stream)
        # A stream has one workspace for cuBLAS, wherever that was allocated when first needed: that may be
        # the memory of another graph, with which it goes. Cleared, it is allocated anew in that of this one.
        torch._C._cuda_clearCublasWorkspaces()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError as error:
            raise CaptureError(_first_cause(error)) from error
        finally:
            torch.cuda.set_stream(current)  # which a capture that fails leaves as it was in it
            torch._C._cuda_clearCublasWorkspaces()
        return graph, result


def _first_cause(error: BaseException) -> str:
    """What went wrong first: that a capture cannot be ended is only what follows from it."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
