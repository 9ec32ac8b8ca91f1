"""Models what a round costs a client: memory, traffic and time, from shapes, before any weight is loaded."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flexlora.rounds.devices import DeviceProfile
from flexlora.uplink.quantise import Bits, quantised_shapes

FLOAT32_BYTES = 4
# Safetensors: 8 bytes of length, then a JSON header with one entry per tensor; measured, not part of the format.
HEADER_BYTES_PER_TENSOR = 110
CALIBRATION_SECONDS = 0.3
# Share of the rate of matrix products that a whole training step reaches; the rest goes to attention, norms and memory
# traffic.
STEP_EFFICIENCY = 0.35


@dataclass(frozen=True)
class BaseShape:
    """What the estimate needs to know of a base model.

    Attributes:
        num_parameters: All of them, embeddings included.
        num_layers: Transformer blocks.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward part.
        vocab_size: Width of the logits.
        bytes_per_parameter: 4 for float32, 2 for bfloat16.
        stored_bytes: Of a weight as it is stored, less where it is quantised; None is ``bytes_per_parameter``.
        checkpoints_gradients: Whether the activations of one block at a time are kept, and the inputs of all others.
    """

    num_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    bytes_per_parameter: int
    stored_bytes: float | None = None
    checkpoints_gradients: bool = False


@dataclass(frozen=True)
class LocalWork:
    """What one client does in one round.

    Attributes:
        num_tokens: Tokens trained on, padding included.
        batch_tokens: Most tokens in one forward pass, padding included.
        answer_tokens: Most tokens of a pass that the loss looks at.
        optimizer: ``adamw`` or ``sgd``.
    """

    num_tokens: float
    batch_tokens: float
    answer_tokens: float
    optimizer: str


@dataclass(frozen=True)
class ClientCost:
    """The estimate for one client type.

    Attributes:
        num_trainable: Trained parameters.
        memory_bytes: Peak while training: weights, factors with gradients and optimiser, activations.
        transfer_bytes: Down, one round, without a folded tail.
        up_bytes: Up, one round.
        train_seconds: One round, on this machine.
    """

    num_trainable: int
    memory_bytes: int
    transfer_bytes: int
    up_bytes: int
    train_seconds: float


def client_cost(
    base: BaseShape,
    ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    work: LocalWork,
    flops_per_second: float,
    wire_bytes: int,
    upload_bits: Bits | None = None,
) -> ClientCost:
    """Return what a client with these ranks per module spends in one round.

    Activations count what back-propagation keeps per token and block (residual stream, attention and feed-forward
    intermediates, one copy of each adapter input); compute counts forward and the gradients of activations, as the
    base weights have none.
    """
    num_trainable = sum(rank * sum(shapes[module]) for module, rank in ranks.items())
    states = {"adamw": 2, "sgd": 1}[work.optimizer]
    adapter_bytes = num_trainable * FLOAT32_BYTES * (2 + states)
    kept_per_block = 10 * base.hidden_size + 6 * base.intermediate_size
    kept_per_token = base.num_layers * kept_per_block
    if base.checkpoints_gradients:
        kept_per_token = base.num_layers * base.hidden_size + kept_per_block
    adapter_inputs = sum(shapes[module][1] + rank for module, rank in ranks.items())
    activations = work.batch_tokens * (kept_per_token * base.bytes_per_parameter + adapter_inputs * FLOAT32_BYTES)
    logits = work.answer_tokens * base.vocab_size * FLOAT32_BYTES * 3
    flops_per_token = 4 * base.num_parameters + 6 * num_trainable
    stored_bytes = base.bytes_per_parameter if base.stored_bytes is None else base.stored_bytes
    transfer_bytes = num_trainable * wire_bytes + 2 * len(ranks) * HEADER_BYTES_PER_TENSOR
    up_bytes = transfer_bytes if upload_bits is None else _compressed_bytes(ranks, shapes, upload_bits)
    return ClientCost(
        num_trainable=num_trainable,
        memory_bytes=int(base.num_parameters * stored_bytes + adapter_bytes + activations + logits),
        transfer_bytes=transfer_bytes,
        up_bytes=up_bytes,
        train_seconds=work.num_tokens * flops_per_token / (flops_per_second * STEP_EFFICIENCY),
    )


def _compressed_bytes(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], bits: Bits) -> int:
    """Return the bytes of rounded factors: codes and scales of both, direction by direction."""
    total = 4 * len(ranks) * HEADER_BYTES_PER_TENSOR
    for module, rank in ranks.items():
        for width in shapes[module]:
            codes, scales = quantised_shapes(rank, width, bits)
            total += codes[0] + FLOAT32_BYTES * scales[0] * scales[1]
    return total


def measure_flops_per_second(hidden_size: int, intermediate_size: int, num_tokens: int, device: str) -> float:
    """Return the float32 matrix rate of this machine at the shapes of a model, from a fraction of a second of work."""
    left = torch.ones(max(1, num_tokens), hidden_size, device=device)
    right = torch.ones(hidden_size, intermediate_size, device=device)
    torch.mm(left, right)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < CALIBRATION_SECONDS:
        torch.mm(left, right)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        count += 1
    return 2.0 * left.shape[0] * hidden_size * intermediate_size * count / (time.perf_counter() - start)


def tail_bytes(
    ranks: Mapping[str, int],
    server_ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    wire_bytes: int,
) -> int:
    """Return the most that a folded tail adds to the broadcast of a client with these ranks."""
    rest = (max(0, rank - ranks.get(module, 0)) * sum(shapes[module]) for module, rank in server_ranks.items())
    return sum(rest) * wire_bytes


def matrix_rate(profile: DeviceProfile) -> float:
    """Return the rate of matrix products alone, as ``client_cost`` takes it; a profile has that of whole steps."""
    return profile.flops_per_second * (1 / STEP_EFFICIENCY)


@dataclass(frozen=True)
class DeviceCost:
    """What one round costs a client on its device.

    Attributes:
        memory_bytes: Peak while training.
        down_bytes: Received.
        up_bytes: Sent.
        download_seconds: Latency included.
        compute_seconds: Local training.
        upload_seconds: Latency included.
    """

    memory_bytes: int
    down_bytes: int
    up_bytes: int
    download_seconds: float
    compute_seconds: float
    upload_seconds: float

    @property
    def seconds(self) -> float:
        """From the start of the download to the end of the upload."""
        return self.download_seconds + self.compute_seconds + self.upload_seconds


def device_cost(profile: DeviceProfile, cost: ClientCost, down_bytes: int, up_bytes: int) -> DeviceCost:
    """Return what a round costs on a device; ``cost`` must be estimated at the ``matrix_rate`` of its profile."""
    return DeviceCost(
        memory_bytes=cost.memory_bytes,
        down_bytes=down_bytes,
        up_bytes=up_bytes,
        download_seconds=profile.latency_seconds + down_bytes / profile.down_bytes_per_second,
        compute_seconds=cost.train_seconds,
        upload_seconds=profile.latency_seconds + up_bytes / profile.up_bytes_per_second,
    )
