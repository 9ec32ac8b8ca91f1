"""Puts what NVFlare's Client API receives into a PEFT model at the client's rank, and makes a reply of it.

load_received(model, flare.receive())
num_examples = train(model)
flare.send(reply_of(model, num_examples))
"""

from dataclasses import replace

from nvflare.app_common.abstract.fl_model import FLModel, MetaKey, ParamsType
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flexlora.adapters.peft_format import AdapterError
from flexlora.adapters.state_dict import adapter_of, state_dict_of
from flexlora.engines.nvflare.cut import CutRule, cut
from flexlora.engines.nvflare.params import (
    SCALINGS_KEY,
    NvflareError,
    adapter_in,
    check_scalings,
    params_of,
    scalings_of,
)
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

_PREFIX = "base_model.model."


class FrozenBranch:
    """A forward hook that adds a low-rank change to a module without training it.

    It is silent while PEFT has the adapters of the module turned off.
    """

    def __init__(self, factors: LoraFactors) -> None:
        self._A, self._B = factors.A.clone(), factors.B * factors.scaling

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the output of the module with the change of its input added."""
        if getattr(module, "disable_adapters", False):
            return output
        x = inputs[0].to(self._A.dtype)
        if self._A.device != x.device:
            self._A, self._B = self._A.to(x.device), self._B.to(x.device)
        return output + (x @ self._A.T @ self._B.T).to(output.dtype)


def load_received(model: PeftModel, received: FLModel) -> None:
    """Put the model that a client received into its PEFT model: the first directions, up to the client's rank.

    Where the method folds the tail, the directions above that rank are added by hooks on the same modules until the
    next call. They are no part of the PEFT adapter: ``save_pretrained`` and ``merge_and_unload`` leave them out.

    Args:
        model: Of any rank up to the server's, on the same target modules; its active adapter is plain LoRA.
        received: From ``flare.receive()``.

    Raises:
        NvflareError: Naming what of the model does not fit the job.
    """
    if not isinstance(received, FLModel):
        raise NvflareError(f"received must be the FLModel of flare.receive(); got {type(received).__name__}")
    rule = CutRule.from_meta(received.meta)
    if any(isinstance(value, Tensor) for value in (received.params or {}).values()):
        raise NvflareError(
            "what the server sent must arrive as arrays; got tensors: set framework=FrameworkType.NUMPY of the "
            "ScriptRunner, because NVFlare's converter for PyTorch wants the same shapes both ways"
        )
    whole, own = adapter_in(received.params, rule.scaling), _own_adapter(model)
    for module in sorted(whole.keys() ^ own.keys()):
        side = "the server's adapter" if module in whole else "this model"
        raise NvflareError(f"{module}: only {side} has factors here; set target_modules of the LoraConfig to the same")
    for module, sent in whole.items():
        found, rank = own[module], own[module].rank
        if found.shape != sent.shape:
            raise NvflareError(f"{module}: must have shape {sent.shape}; got {found.shape}: another base model?")
        if not (rank == sent.rank if rule.needs_one_rank else rank <= sent.rank):
            rule_of_ranks = f"be {sent.rank}" if rule.needs_one_rank else f"be in 1..{sent.rank}"
            raise NvflareError(f"{module}: rank must {rule_of_ranks}, for the server has rank {sent.rank}; got {rank}")
        if not (sent.A.isfinite().all() and sent.B.isfinite().all()):
            raise NvflareError(f"{module}: what the server sent must be finite; it holds NaN or infinity")
    wanted = {module: replace(found, scaling=rule.scaling(found.rank)) for module, found in own.items()}
    check_scalings(wanted, scalings_of(own))
    part = cut(whole, {module: found.rank for module, found in own.items()}, rule)
    set_peft_model_state_dict(model, state_dict_of(part.trainable), adapter_name=_active(model))
    _set_branches(model, part.frozen or {})


def reply_of(model: PeftModel, num_examples: int) -> FLModel:
    """Return what a client sends back: its factors at its own rank, their scaling, and its weight.

    Args:
        model: The one that ``load_received`` was given, trained.
        num_examples: Examples that it was trained on: its weight in the mean.

    Raises:
        NvflareError: If there are no examples, or the adapter is not plain LoRA.
    """
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 1:
        raise NvflareError(f"num_examples must be a whole number of at least 1; got {num_examples!r:.60}")
    own = _own_adapter(model)
    return FLModel(
        params_type=ParamsType.FULL,
        params=params_of(own),
        meta={MetaKey.NUM_STEPS_CURRENT_ROUND: num_examples, SCALINGS_KEY: scalings_of(own)},
    )


def _own_adapter(model: PeftModel) -> AdapterState:
    """Return the active adapter of a PEFT model with the scalings of its layers; the factors are not copied."""
    name = _active(model)
    state_dict = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    try:
        factors = adapter_of({key: value.detach() for key, value in state_dict.items()}, Scaling("constant_ratio", 1.0))
    except AdapterError as error:
        raise NvflareError(
            f"the adapter {name!r} must be plain LoRA on linear modules, without DoRA, biases or whole modules; {error}"
        ) from None
    layers = {path: _layer(model, path) for path in factors}
    return {path: replace(own, scaling=layers[path].scaling[name]) for path, own in factors.items()}


def _active(model: PeftModel) -> str:
    """Return the name of the one adapter that a model has active."""
    if not isinstance(model, PeftModel):
        raise NvflareError(f"model must be a PeftModel, as get_peft_model returns it; got {type(model).__name__}")
    if not isinstance(model.active_adapter, str):
        raise NvflareError(f"model must have one active adapter; got {model.active_adapter!r:.200}")
    return model.active_adapter


def _layer(model: PeftModel, path: str) -> LoraLayer:
    layer = model.get_submodule(_PREFIX + path)
    assert isinstance(layer, LoraLayer)
    return layer


def _set_branches(model: PeftModel, frozen: AdapterState) -> None:
    """Add these branches to a model, and take away those of the round before."""
    for layer in model.modules():
        for key in [key for key, hook in layer._forward_hooks.items() if isinstance(hook, FrozenBranch)]:
            del layer._forward_hooks[key]
    for path, factors in frozen.items():
        model.get_submodule(_PREFIX + path).register_forward_hook(FrozenBranch(factors))
