"""Functions that run as the ranks of a group of processes (gloo), each run with a time limit, so that a hang fails."""

import pickle
import queue
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def run_ranks(function, path, world=2, seconds=240):
    """What ``function(rank, initialise)`` returns in each of the processes; a failure is the first that came."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_one_rank, args=(function, rank, world, path, results)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=seconds) for _ in processes]
    except queue.Empty:
        raise AssertionError(f"{function}: not all of {world} ranks ended within {seconds} s") from None
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    failures = [failure for _, failure, _ in found if failure is not None]
    assert not failures, failures[0]
    return [pickle.loads(result) for _, _, result in sorted(found, key=lambda result: result[0])]


def _one_rank(function, rank, world, path, results):
    torch.set_num_threads(1)

    def initialise():
        limit = timedelta(seconds=60)  # of a collective: a rank that has failed leaves no other waiting for long
        dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=world, timeout=limit)

    try:
        results.put((rank, None, pickle.dumps(function(rank, initialise))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # pytest's failures too
        results.put((rank, traceback.format_exc(), None))
