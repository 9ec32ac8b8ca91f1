"""Plays a client for the contract: it changes what a broadcast lets it train, and returns what the server then has."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flexlora.federation.known_rows import mask_of
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors


def reply(broadcast: Broadcast, client_id: str, weight: float, seed: int, step: float = 0.3) -> Update:
    """Return the update of a client that trained, as it arrives at a server.

    Training is noise on what the broadcast lets clients train, the entries of its mask where there is one. What was not
    trained, and a factor that the client keeps, has the value that the broadcast had.

    Args:
        broadcast: What the client was sent.
        client_id: Of the client.
        weight: Its weight.
        seed: Of the noise.
        step: Standard deviation of the noise; 0 returns what was sent.
    """
    rng = torch.Generator().manual_seed(seed)
    travels = travelling(broadcast)
    payload: dict[str, LoraFactors] = {}
    cores: dict[str, Tensor] = {}
    for module, factors in broadcast.trainable.items():
        noise = [step * torch.randn(factor.shape, generator=rng) for factor in (factors.A, factors.B)]
        if broadcast.mask is not None:
            noise[1] *= mask_of(broadcast.mask, module, (factors.B.shape[0], factors.rank))
        A = factors.A + noise[0] * ("A" in travels)
        B = factors.B + noise[1] * ("B" in travels)
        payload[module] = LoraFactors(A, B, factors.scaling)
        if broadcast.cores is not None:
            core = broadcast.cores[module]
            cores[module] = core + step * torch.randn(core.shape, generator=rng) * ("core" in travels)
    return Update(client_id, payload, weight, cores=cores if "core" in travels else None)


def travelling(broadcast: Broadcast) -> frozenset[str]:
    """Return what of an update comes back from a client, of ``A``, ``B`` and ``core``: the trained and not kept."""
    trained = {"both": {"A", "B"}, "A": {"A"}, "B": {"B"}, "core": {"core"}}[broadcast.train_factors]
    return frozenset(trained - {broadcast.kept})


def ran(sent: Broadcast, update: Update) -> Broadcast:
    """Return a broadcast that holds the model which a client ran at the end of its training."""
    return replace(sent, trainable=update.payload, cores=update.cores or sent.cores)


def with_own_factors(broadcast: Broadcast) -> Broadcast:
    """Return a broadcast as a client runs it that has kept a factor: in place of what was sent, always the same one."""
    if broadcast.kept is None:
        return broadcast
    trainable: dict[str, LoraFactors] = {}
    for module, factors in broadcast.trainable.items():
        own = _kept((factors.B if broadcast.kept == "B" else factors.A).shape)
        trainable[module] = replace(factors, A=own) if broadcast.kept == "A" else replace(factors, B=own)
    return replace(broadcast, trainable=trainable)


def as_type(update: Update, dtype: torch.dtype, travels: frozenset[str] = frozenset("AB")) -> Update:
    """Return a copy of an update in which what travelled has another type."""
    payload = {
        module: LoraFactors(
            factors.A.detach().to(dtype if "A" in travels else factors.A.dtype, copy=True),
            factors.B.detach().to(dtype if "B" in travels else factors.B.dtype, copy=True),
            factors.scaling,
        )
        for module, factors in update.payload.items()
    }
    cores = update.cores and {module: core.detach().to(dtype, copy=True) for module, core in update.cores.items()}
    return replace(update, payload=payload, cores=cores)


def only_modules(update: Update, modules: Mapping[str, object]) -> Update:
    """Return an update without the modules that are not named."""
    payload = {module: factors for module, factors in update.payload.items() if module in modules}
    cores = update.cores and {module: core for module, core in update.cores.items() if module in modules}
    return replace(update, payload=payload, cores=cores)


def in_another_gauge(adapter: AdapterState, seed: int) -> AdapterState:
    """Return ``(B M, M^-1 A)`` in float64 for a well-conditioned random ``M``: other factors, the same product."""
    rng = np.random.default_rng(seed)
    turned: dict[str, LoraFactors] = {}
    for module, factors in adapter.items():
        mixing = np.eye(factors.rank) + 0.4 * rng.standard_normal((factors.rank, factors.rank)) / factors.rank
        A = np.linalg.solve(mixing, factors.A.double().numpy())
        B = factors.B.double().numpy() @ mixing
        turned[module] = LoraFactors(torch.tensor(A), torch.tensor(B), factors.scaling)
    return turned


def _kept(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
