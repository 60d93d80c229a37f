"""Capturing work on a GPU as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def capture(
    work: Callable[[], T], device: torch.device, warm_ups: int = 3, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Return ``work``, done on ``device``, as a graph, and what it returned, which each replay overwrites.

    ``work`` is done ``warm_ups`` times before that, as libraries choose and compile at first use, which must
    not happen during a capture. Other threads may copy on the GPU meanwhile, not multiply: the workspaces of
    their products are cleared, too.

    Graphs with the same ``pool`` (``torch.cuda.graph_pool_handle()``) have one memory: a replay of any of
    them overwrites what the others returned.

    Raises:
        RuntimeError: ``work`` does what a graph cannot hold, such as waiting for the GPU.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        # A stream has one workspace for cuBLAS, wherever that was allocated when first needed: that may be
        # the memory of another graph, with which it goes. Cleared, it is allocated anew in that of this one.
        torch._C._cuda_clearCublasWorkspaces()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            result = work()
        torch._C._cuda_clearCublasWorkspaces()
        return graph, result
