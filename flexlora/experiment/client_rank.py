"""Chooses the ranks of a client from what its device has: free memory, and how long a training step takes there."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from flexlora.data.prompts import EncodedExample, num_labels
from flexlora.engines.flower.client_work import ClientRefusal
from flexlora.engines.flower.run_settings import RunSettings
from flexlora.experiment.device_ranks import Budget, affordable_ranks
from flexlora.federation.clients import RankPlan
from flexlora.federation.messages import Broadcast
from flexlora.limits import free_memory_bytes
from flexlora.lora.factors import Scaling
from flexlora.rounds.costs import BaseShape, DeviceCost, LocalWork, client_cost, device_cost, matrix_rate
from flexlora.rounds.devices import DeviceProfile
from flexlora.text import bytes_text
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.one_client import train_client
from flexlora.training.targets import find_targets

SHARE_OF_FREE = 0.8
"""Of the free memory; the rest is left to whatever else runs on the device and to what the estimate leaves out."""

# The time of a round bounds ranks only after a step has been timed.
_UNTIMED_FLOPS = 1e15


@dataclass(frozen=True)
class OwnLimits:
    """What a client's user allows a round.

    Attributes:
        memory_bytes: For base model and training together; None takes a share of what is free on the device.
        round_seconds: Most seconds that local training may take; None is any.
    """

    memory_bytes: int | None = None
    round_seconds: float | None = None


@dataclass(frozen=True)
class _Load:
    """What training costs this client at any ranks."""

    run: RunSettings
    base: BaseShape
    shapes: Mapping[str, tuple[int, int]]
    work: LocalWork

    def cost(self, profile: DeviceProfile, ranks: Mapping[str, int]) -> DeviceCost:
        """Return the cost of a round."""
        wire_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}[self.run.wire_dtype]
        cost = client_cost(self.base, ranks, self.shapes, self.work, matrix_rate(profile), wire_bytes)
        return device_cost(profile, cost, 0, 0)


def choose_plan(
    run: RunSettings, model: AdaptedModel, examples: Sequence[EncodedExample], limits: OwnLimits
) -> RankPlan:
    """Return the largest ranks that fit a client's memory and, if its user bounds it, the time of a round.

    Ranks are powers of two within what the run allows, and the largest that it allows. Memory is estimated for a batch
    of the longest examples, beside the base model that is loaded already. If time is bounded, a step is trained at the
    ranks that fit memory; the ranks are lowered to what its measured time allows.

    Args:
        run: Of the server.
        model: The loaded base model.
        examples: The client's own, as tokens.
        limits: What its user allows.

    Raises:
        ClientRefusal: If the smallest rank does not fit.
    """
    load = _load_of(run, model, examples)
    base_bytes = load.base.num_parameters * load.base.bytes_per_parameter
    free = limits.memory_bytes
    if free is None:
        free = int(SHARE_OF_FREE * free_on(model.device)) + base_bytes
    profile = DeviceProfile("this device", free, _UNTIMED_FLOPS, math.inf, math.inf)
    choices = tuple(sorted({*(1 << power for power in range(run.largest_rank.bit_length())), run.largest_rank}))
    budget = Budget(choices, limits.round_seconds, seconds_from="--round-seconds")

    def fitting(of: DeviceProfile, within: Budget) -> RankPlan:
        """Return the largest ranks within a budget."""
        found = affordable_ranks(of, within, load.shapes, lambda ranks: load.cost(of, ranks))
        if found.plan is None:
            raise ClientRefusal(
                f"no rank fits this device: {found.reason}; free some memory, or choose by hand: --rank 1, --memory "
                f"{bytes_text(2 * found.cost.memory_bytes).replace(' ', '')}, --round-seconds"
            )
        return found.plan

    plan = fitting(profile, replace(budget, round_seconds=None))
    if limits.round_seconds is not None:
        ranks = plan.resolve(load.shapes)
        seconds = _seconds_of_a_round(run, model, examples, ranks)
        # The rate at which the estimate gives the seconds that were measured.
        rate = _UNTIMED_FLOPS * load.cost(profile, ranks).compute_seconds / seconds
        plan = fitting(replace(profile, flops_per_second=rate), budget)
    return _named(plan)


def free_on(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        # Memory is shared with the system there.
        most = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return max(0, min(most, free_memory_bytes()))
    return free_memory_bytes()


def _load_of(run: RunSettings, model: AdaptedModel, examples: Sequence[EncodedExample]) -> _Load:
    text = model.network.config.get_text_config()
    selection = run.target_modules
    shapes = find_targets(model.network, selection).shapes
    size = run.training.batch_size
    longest = sorted((len(example.input_ids) for example in examples), reverse=True)[:size]
    answers = sorted((num_labels(example.labels) for example in examples), reverse=True)[:size]
    training = run.training.settings()
    steps = training.num_steps(len(examples)) * training.gradient_accumulation_steps
    base = BaseShape(
        num_parameters=model.num_parameters,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocab_size=text.vocab_size,
        bytes_per_parameter=model.network.dtype.itemsize,
    )
    # A batch is padded to its longest example.
    batch_tokens = len(longest) * longest[0]
    mean = sum(len(example.input_ids) for example in examples) / len(examples)
    work = LocalWork(
        num_tokens=steps * len(longest) * mean,
        batch_tokens=batch_tokens,
        answer_tokens=sum(answers),
        optimizer=training.optimizer,
    )
    return _Load(run, base, shapes, work)


def _seconds_of_a_round(
    run: RunSettings, model: AdaptedModel, examples: Sequence[EncodedExample], ranks: Mapping[str, int]
) -> float:
    """Return how long a round takes, from one step that is trained and thrown away."""
    training = run.training.settings()
    per_step = training.batch_size * training.gradient_accumulation_steps
    adapter = model.initial_adapter(ranks, Scaling(run.scaling, run.lora_alpha), 0)
    one_step = replace(training, max_steps=1)
    seconds = 0.0
    # The first step finds out what it can about the network and warms caches.
    for _ in range(2):
        begin = time.perf_counter()
        train_client(model, Broadcast(adapter), examples[:per_step], one_step, 0.0, 0)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds = time.perf_counter() - begin
    return seconds * training.num_steps(len(examples))


def _named(plan: RankPlan) -> RankPlan:
    """Return a plan named after its ranks."""
    ranks = list(dict.fromkeys(rank for _, rank in plan.patterns))
    return replace(plan, name=f"rank-{ranks[0]}" if len(ranks) == 1 else f"ranks-{'-'.join(map(str, ranks))}")
