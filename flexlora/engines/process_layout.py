"""Chooses how many processes train a cohort, on which devices and with how many CPU threads each."""

import torch

from flexlora.limits import num_cores

# A larger base keeps several threads busy, and one process needs the least memory.
_MOST_PARAMETERS = 200_000_000


def choose_processes(
    device: str, num_parameters: int, num_processes: int | None, num_threads: int | None
) -> tuple[list[str], int]:
    """Return the device of each child and the CPU threads of every process.

    Args:
        device: Where this process trains; ``cuda`` stands for all GPUs, ``cuda:N`` for one.
        num_parameters: Size of the base model.
        num_processes: Including this one; None means one per GPU, or one per core if the base is small.
        num_threads: None means one if the base is small, else PyTorch's own choice divided among the processes.
    """
    is_small = device == "cpu" and num_parameters <= _MOST_PARAMETERS
    if device.startswith("cuda"):
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if device == "cuda" else [device]
        number = num_processes or len(devices)
    else:
        devices = [device]
        number = num_processes or (max(1, num_cores() // (num_threads or 1)) if is_small else 1)
    threads = num_threads or (1 if is_small else max(1, torch.get_num_threads() // number))
    return [devices[index % len(devices)] for index in range(1, number)], threads
