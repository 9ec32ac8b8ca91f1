"""Measures how fast this machine trains a base, on few and on some more of its blocks with made-up weights.

A step of a small base is mostly what surrounds its products, and a formula serves; in a larger one it depends on the
type of the weights, the processor and the processes side by side, which are all there when blocks are trained.
"""

import copy
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexlora.data.prompts import IGNORED, EncodedExample
from flexlora.experiment.config import Config
from flexlora.experiment.workload import Workload
from flexlora.federation.clients import RankPlan
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import frozen, target_modules
from flexlora.training.group import train_group
from flexlora.training.group_layers import reason_against_groups
from flexlora.training.group_passes import GroupJob

# Numbers of blocks that are measured, the first that fit; more of them no more stay in the caches than the whole does.
_BLOCKS = ((2, 8), (1, 3), (1, 2))
_MOST_BYTES = 1_000_000_000
# Clients share passes until these have about so many tokens, as chunks of a larger base do.
_GROUP_TOKENS = 256
# Of a client's step; a larger one takes as many times as long.
_MOST_TOKENS = 512
_MOST_SECONDS = 1.5
_MOST_STEPS = 7


def measured_rate(
    config: Config,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    workload: Workload,
    plan: RankPlan,
    num_processes: int,
) -> float | None:
    """Return the rate of matrix products at which ``workload.cost`` gives the seconds that were measured.

    Args:
        config: The run.
        base: Without weights.
        tokenizer: Its tokenizer.
        workload: Of the run.
        plan: Ranks of the clients.
        num_processes: That will train side by side; the others are stood in for by products of the same size.

    Returns:
        Floating point operations a second of one process, or None where the base has no blocks that stand alone, they
        are too large to try, or clients cannot share passes through them.
    """
    shape = workload.base
    vocabulary_bytes = 2 * shape.vocab_size * shape.hidden_size * shape.bytes_per_parameter
    block_bytes = shape.num_parameters * shape.bytes_per_parameter / max(1, shape.num_layers)
    fitting = (own for own in _BLOCKS if own[1] * block_bytes + vocabulary_bytes <= _MOST_BYTES)
    few, more = next(fitting, (0, 0))
    if not few or more > shape.num_layers:
        return None
    step = replace(
        workload, training=replace(workload.training, num_epochs=1.0, max_steps=None, gradient_accumulation_steps=1)
    )
    try:
        with torch.random.fork_rng(devices=[]), _others_at_work(workload, num_processes - 1):
            of_few, of_more = (_seconds(config, base, number, tokenizer, step, plan) for number in (few, more))
    except Exception:  # Whatever an architecture makes of so few blocks.
        return None
    a_block = max(of_more - of_few, 0.0) / (more - few)
    seconds = of_few + (shape.num_layers - few) * a_block
    return step.cost(plan.resolve(step.shapes), step.training.batch_size, 1.0).train_seconds / seconds


def _seconds(
    config: Config,
    base: PreTrainedModel,
    num_blocks: int,
    tokenizer: PreTrainedTokenizerBase,
    step: Workload,
    plan: RankPlan,
) -> float:
    """Return how long an optimiser step of one client takes a base of so few blocks, when clients share passes."""
    network = _blocks(base, num_blocks, step.base.bytes_per_parameter)
    model = AdaptedModel(network, tokenizer, dropout=config.lora.dropout)
    ranks = plan.resolve(target_modules(network, config.lora.target_modules))
    adapter = model.initial_adapter({path: rank for path, rank in ranks.items() if rank}, Scaling("rslora", 1.0), 0)
    if reason_against_groups(network, adapter, base_drops_out=model.base_drops_out):
        raise NotImplementedError
    size = step.training.batch_size
    length = max(2, round(step.batch_tokens / size))
    answer = min(length - 1, max(1, round(step.answer_tokens / size)))
    tokens = tuple(index % step.base.vocab_size for index in range(length))
    example = EncodedExample(tokens, (*[IGNORED] * (length - answer), *tokens[length - answer :]))
    rows = min(size, max(1, _MOST_TOKENS // length))
    number = max(1, round(_GROUP_TOKENS / (rows * length)))
    jobs = [GroupJob(Broadcast(adapter), [example] * rows, 1e-4, seed) for seed in range(number)]
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 2 or (len(taken) < _MOST_STEPS and time.perf_counter() - begin < _MOST_SECONDS):
        start = time.perf_counter()
        for outcome in train_group(model, jobs, step.training):
            if isinstance(outcome, Exception):
                raise outcome
        taken.append(time.perf_counter() - start)
    # The first finds out what it can about the network.
    return statistics.median(taken[1:]) / number * size / rows


def _blocks(base: PreTrainedModel, number: int, bytes_per_parameter: int) -> PreTrainedModel:
    """Return a model like the base with so few blocks and made-up weights."""
    config = copy.deepcopy(base.config)
    text = config.get_text_config()
    text.num_hidden_layers = number
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:number]
    dtype = torch.bfloat16 if bytes_per_parameter == 2 else torch.float32
    # Not by the auto class, which would ask again whether code of others may run.
    return frozen(type(base)._from_config(config, dtype=dtype))


@contextmanager
def _others_at_work(workload: Workload, number: int) -> Iterator[None]:
    """Let so many threads take products as large as the base's, as processes side by side do."""
    shape = workload.base
    dtype = torch.bfloat16 if shape.bytes_per_parameter == 2 else torch.float32
    over = threading.Event()

    def work() -> None:
        """Take one product after the other, with weights that do not stay in the caches."""
        x = torch.ones(max(1, int(workload.batch_tokens)), shape.hidden_size, dtype=dtype)
        weights = [torch.ones(shape.intermediate_size, shape.hidden_size, dtype=dtype) for _ in range(8)]
        while not over.is_set():
            for weight in weights:
                torch.nn.functional.silu(torch.nn.functional.linear(x, weight))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
