"""What a run will do and cost, before any weight is loaded."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexlora.clients import compact_ranks
from flexlora.config import Config, FlexLoraMethod
from flexlora.costs import BaseShape, ClientCost, LocalWork, client_cost, measure_flops_per_second
from flexlora.data.prompts import IGNORED, encode_many
from flexlora.model import load_empty_model, target_modules
from flexlora.participants import Participants, gather_participants
from flexlora.report.tables import bytes_text, seconds_text
from flexlora.workbench import adapted_shapes, base_name, check_length, cohort_size, largest_ranks, resolve_device

TOKEN_SAMPLE = 256


@dataclass(frozen=True)
class PlanRow:
    """What one kind of client will do and spend in a round."""

    name: str
    ranks: Mapping[str, int]
    num_clients: int
    cost: ClientCost
    down_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run will do and cost.

    Attributes:
        facts: Pairs of a name and a value for a person.
        types: One row per rank plan.
        notes: Sentences on how the estimate was made.
    """

    facts: Sequence[tuple[str, str]]
    types: Sequence[PlanRow]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "facts": dict(self.facts),
            "types": {
                row.name: {
                    "ranks": dict(row.ranks),
                    "num_clients": row.num_clients,
                    "down_bytes": row.down_bytes,
                    **dataclasses.asdict(row.cost),
                }
                for row in self.types
            },
            "notes": list(self.notes),
        }


def plan_experiment(config: Config) -> Plan:
    """Return what a run will do and cost; reads data and tokenizer, but no weights."""
    participants = gather_participants(config)
    base, tokenizer = load_empty_model(
        base_name(config), revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )
    shapes = adapted_shapes(target_modules(base, config.lora.target_modules), participants.plans.values())
    device = resolve_device(config.model.device)
    if config.model.num_threads is not None:
        torch.set_num_threads(config.model.num_threads)
    check_length(base.config, config.data.max_length)
    text = base.config.get_text_config()
    training, data, rounds = config.training, config.data, config.rounds
    sample = [
        example
        for client in participants.clients[:TOKEN_SAMPLE]
        for example in participants.corpus.clients[client.client_id].train[:1]
    ]
    encoded = encode_many(sample, tokenizer, data.template, data.max_length, loss_on=data.loss_on)
    lengths = [len(example.input_ids) for example in encoded]
    answers = sum(label != IGNORED for example in encoded for label in example.labels) / len(encoded)
    # A batch is as long as its longest example.
    padded = sum(lengths) / len(lengths) * 1.25
    shape = BaseShape(
        num_parameters=sum(parameter.numel() for parameter in base.parameters()),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocab_size=text.vocab_size,
        bytes_per_parameter={"float32": 4, "bfloat16": 2}[config.model.dtype],
    )
    batch_tokens = training.batch_size * padded
    rate = measure_flops_per_second(shape.hidden_size, shape.intermediate_size, int(batch_tokens), device)
    wire_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}[rounds.wire_dtype]
    server_ranks = largest_ranks(participants.plans.values(), shapes)
    if isinstance(config.method, FlexLoraMethod) and config.method.server_rank is not None:
        server_ranks = dict.fromkeys(server_ranks, config.method.server_rank)
    rows = []
    for name, plan in participants.plans.items():
        ranks = plan.resolve(shapes)
        own = [client for client in participants.clients if client.plan == plan]
        examples = sum(client.num_examples for client in own) / len(own)
        steps = math.ceil(examples * training.num_epochs / training.batch_size / training.gradient_accumulation_steps)
        work = LocalWork(
            steps=min(steps, training.max_steps or steps),
            batch_tokens=batch_tokens,
            passes_per_step=training.gradient_accumulation_steps,
            answer_tokens=answers * training.batch_size,
            optimizer=training.optimizer,
        )
        cost = client_cost(shape, ranks, shapes, work, rate, wire_bytes)
        folded = config.method.name == "flexlora" and config.method.fold_tail
        tail = sum(max(0, rank - ranks.get(module, 0)) * sum(shapes[module]) for module, rank in server_ranks.items())
        down_bytes = cost.transfer_bytes + (tail * wire_bytes if folded else 0)
        rows.append(PlanRow(name, compact_ranks(ranks, shapes), len(own), cost, down_bytes))
    per_round = cohort_size(config, len(participants.clients))
    return Plan(_plan_facts(config, participants, shape, rows, per_round), rows, participants.warnings + PLAN_NOTES)


PLAN_NOTES = (
    "Memory and time are estimates from shapes and a short measurement of this machine; transfers follow from the "
    "factors' shapes, and a folded tail is counted at its most. Server work and evaluation come on top.",
)


def _plan_facts(
    config: Config, participants: Participants, shape: BaseShape, rows: Sequence[PlanRow], per_round: int
) -> list[tuple[str, str]]:
    num_clients, num_rounds = len(participants.clients), config.rounds.num_rounds

    def per_run(value: Callable[[PlanRow], float]) -> float:
        return num_rounds * per_round * sum(row.num_clients * value(row) for row in rows) / num_clients

    examples = sum(client.num_examples for client in participants.clients)
    return [
        ("Base model", f"{config.model.name_or_path}, {shape.num_parameters:,} parameters, {config.model.dtype}"),
        ("Method", config.method.name),
        ("Clients", f"{num_clients:,} with {examples:,} training examples; {per_round} in each of {num_rounds} rounds"),
        ("Unseen tasks", f"{len(participants.corpus.unseen)}"),
        ("Traffic of the run", f"{bytes_text(per_run(lambda row: row.down_bytes + row.cost.transfer_bytes))}"),
        (
            "Local training of the run",
            f"about {seconds_text(per_run(lambda row: row.cost.train_seconds))} on this machine",
        ),
    ]
