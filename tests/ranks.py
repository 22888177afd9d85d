"""Functions that run as the ranks of a group of processes (gloo), of which the first failure ends all."""

import pickle
import queue
import traceback

import torch
import torch.distributed as dist


def run_ranks(function, path, world=2):
    """What ``function(rank, initialise)`` returns in each of the processes.

    A failure is the first that came, whose rank may have left others waiting. What hangs ends after the half an hour
    that PyTorch gives a collective, which no busy machine needs.
    """
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_one_rank, args=(function, rank, world, path, results)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < world:
            rank, failure, result = _next(results, processes)
            assert failure is None, failure
            found[rank] = pickle.loads(result)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(world)]


def _next(results, processes):
    """The next result, or a failure where none can come any more from one of the processes."""
    while True:
        died = [process.exitcode for process in processes if process.exitcode]
        try:
            return results.get(timeout=1)
        except queue.Empty:
            assert not died, f"a rank ended with {died[0]}"


def _one_rank(function, rank, world, path, results):
    torch.set_num_threads(1)

    def initialise():
        dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=world)

    try:
        results.put((rank, None, pickle.dumps(function(rank, initialise))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # pytest's failures too
        results.put((rank, traceback.format_exc(), None))
