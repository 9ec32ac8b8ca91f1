"""Estimates what a round takes a client of a run, from shapes and the lengths of its texts."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexlora.aggregators.settings import Traits
from flexlora.data.examples import Example, FederatedCorpus
from flexlora.data.prompts import IGNORED, encode_many
from flexlora.experiment.base import check_tokenizer, load_empty
from flexlora.experiment.config import Config
from flexlora.experiment.corpora import length_sample
from flexlora.experiment.target_patterns import check_patterns
from flexlora.rounds.costs import (
    BaseShape,
    ClientCost,
    DeviceCost,
    LocalWork,
    client_cost,
    device_cost,
    matrix_rate,
    tail_bytes,
)
from flexlora.rounds.devices import DeviceProfile
from flexlora.training.one_client import LocalTraining
from flexlora.training.quantized_base import STORED_BYTES
from flexlora.training.targets import find_targets
from flexlora.uplink.quantise import Bits

# A batch is as long as its longest example.
PADDING = 1.25


@dataclass(frozen=True)
class Workload:
    """What is needed to estimate a round of any client of a run.

    Attributes:
        base: Of the base model.
        shapes: Module path -> (out_features, in_features) of every target module.
        batch_tokens: Tokens in one forward pass of a whole batch, padding included.
        answer_tokens: Tokens of such a pass that the loss looks at.
        training: How clients train.
        wire_bytes: Of one number on its way.
        upload_bits: Of one number on its way to the server, where updates are compressed.
        notes: Sentences about what of the base gets no adapter.
    """

    base: BaseShape
    shapes: Mapping[str, tuple[int, int]]
    batch_tokens: float
    answer_tokens: float
    training: LocalTraining
    wire_bytes: int
    upload_bits: Bits | None = None
    notes: tuple[str, ...] = ()

    def cost(self, ranks: Mapping[str, int], num_examples: float, flops_per_second: float) -> ClientCost:
        """Return what a client with these ranks and examples spends in one round.

        Args:
            ranks: Module path -> rank.
            num_examples: Of the client; a mean may be a fraction.
            flops_per_second: Of matrix products, as ``measure_flops_per_second`` and ``matrix_rate`` give it.
        """
        batch_size = self.training.batch_size
        # A batch is never larger than what the client has.
        share = min(1.0, num_examples / batch_size)
        work = LocalWork(
            num_tokens=self.num_seen(num_examples) * self.batch_tokens / batch_size,
            batch_tokens=share * self.batch_tokens,
            answer_tokens=share * self.answer_tokens,
            optimizer=self.training.optimizer,
        )
        return client_cost(self.base, ranks, self.shapes, work, flops_per_second, self.wire_bytes, self.upload_bits)

    def num_seen(self, num_examples: float) -> float:
        """Return how many examples a client's round trains on, those of later epochs again."""
        training, whole_examples = self.training, math.ceil(num_examples)
        steps_per_epoch = replace(training, num_epochs=1.0, max_steps=None).num_steps(whole_examples)
        epochs, rest = divmod(training.num_steps(whole_examples), steps_per_epoch)
        per_step = training.batch_size * training.gradient_accumulation_steps
        return epochs * num_examples + min(num_examples, rest * per_step)

    def tail_bytes(self, ranks: Mapping[str, int], server_ranks: Mapping[str, int]) -> int:
        """Return the most that a folded tail adds to the broadcast of a client with these ranks."""
        return tail_bytes(ranks, server_ranks, self.shapes, self.wire_bytes)


def local_training(config: Config, traits: Traits | None = None) -> LocalTraining:
    """Return the settings of one client's training.

    Args:
        config: The run.
        traits: Of the method, which may prescribe the optimiser; None takes the method of the run.
    """
    training, prescribed = config.training, (traits or config.method.traits()).local_optimizer
    return LocalTraining(
        optimizer=prescribed or training.optimizer,
        batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_epochs=training.num_epochs,
        max_steps=training.max_steps,
        max_grad_norm=training.max_grad_norm,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
        proximal=training.proximal,
    )


def steps_alone(config: Config) -> LocalTraining:
    """Return the settings of a client that trains alone, for comparison."""
    return replace(local_training(config), num_epochs=config.evaluation.local_only_epochs, max_steps=None)


def measure_workload(
    config: Config, examples: Iterable[Example], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Workload:
    """Return the workload of a run, with lengths from a sample of its examples.

    Args:
        config: The run.
        examples: A sample, one per client say.
        base: The base model; its weights are not used.
        tokenizer: Its tokenizer.
    """
    text, data, training = base.config.get_text_config(), config.data, config.training
    check_tokenizer(base, tokenizer, data.template)
    targets = find_targets(base, config.lora.target_modules)
    check_patterns(config, targets)
    encoded = encode_many(list(examples), tokenizer, data.template, data.max_length, loss_on=data.loss_on)
    lengths = [len(example.input_ids) for example in encoded]
    answers = sum(label != IGNORED for example in encoded for label in example.labels) / len(encoded)
    shape = BaseShape(
        num_parameters=sum(parameter.numel() for parameter in base.parameters()),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocab_size=text.vocab_size,
        bytes_per_parameter={"float32": 4, "bfloat16": 2}[config.model.dtype],
        stored_bytes=None if config.model.quantization is None else STORED_BYTES[config.model.quantization],
        checkpoints_gradients=config.model.gradient_checkpointing,
    )
    return Workload(
        base=shape,
        shapes=targets.shapes,
        batch_tokens=training.batch_size * sum(lengths) / len(lengths) * (PADDING if training.batch_size > 1 else 1.0),
        answer_tokens=answers * training.batch_size,
        training=local_training(config),
        wire_bytes={"float32": 4, "bfloat16": 2, "float16": 2}[config.rounds.wire_dtype],
        upload_bits=config.rounds.upload_bits,
        notes=targets.notes,
    )


def workload_of(config: Config, corpus: FederatedCorpus) -> Workload:
    """Return what a round takes; reads the base model's shapes and tokenizer, but no weights."""
    base, tokenizer = load_empty(config)
    return measure_workload(config, length_sample(corpus), base, tokenizer)


def cost_on_device(
    workload: Workload,
    profile: DeviceProfile,
    ranks: Mapping[str, int],
    num_examples: float,
    folded_ranks: Mapping[str, int],
) -> DeviceCost:
    """Return what a round costs on a device.

    Args:
        ranks: Module path -> rank.
        num_examples: Of the client.
        folded_ranks: Module path -> rank up to which the tail is sent along; empty when it is not.
    """
    cost = workload.cost(ranks, num_examples, matrix_rate(profile))
    down_bytes = cost.transfer_bytes + workload.tail_bytes(ranks, folded_ranks)
    return device_cost(profile, cost, down_bytes, cost.up_bytes)
