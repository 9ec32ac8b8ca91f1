"""What a comparison is made from, and what is refused before anything is loaded."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexlora.errors import FlexLoraError
from flexlora.experiment.compare_arms import by_label, controls, read_arms
from flexlora.experiment.compare_controls import clients_of, pooled
from flexlora.experiment.compare_draws import draw_config
from flexlora.experiment.compare_jobs import Job, Study
from flexlora.experiment.compare_study import make_study, reference_of
from flexlora.experiment.config_file import load_config
from flexlora.federation.client_types import four_types
from flexlora.federation.clients import ClientSpec
from flexlora.lora.factors import Scaling
from flexlora.rounds.loop_parts import Federation, Loop
from flexlora.uplink.compression import Compression

DEMO = "configs/demo.yaml"


def study(*overrides: str, methods: str = "flexlora", **changes: Any) -> Study:
    return make_study(DEMO, overrides, read_arms(methods), **({"draws": 2} | changes))


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        (["method.name=fedit"], {}, "belongs to --methods"),
        (["method={name: fedit}"], {}, "belongs to --methods"),
        (["clients.counts={type1: 20}", "data.num_clients=20"], {"distributions": ["uniform"]}, "clients.counts says"),
        (["clients.assigned={a: type1}"], {"distributions": ["uniform"]}, "clients.assigned says"),
        (
            ["clients.ranks_from=devices", "devices.profiles=built_in"],
            {"distributions": ["normal"]},
            "clients.ranks_from=devices says",
        ),
        (
            ["clients.types={only: {attention: 4, ffn: 4}}", "clients.distribution={only: 1}"],
            {"distributions": ["uniform"]},
            "clients.distribution",
        ),
        (["data.validation_examples=0"], {}, "validation"),
        ([], {"distributions": ["nope"]}, "must be among"),
        ([], {"tune_on": "uniform"}, "--tune-on"),
        ([], {"draws": 0}, "--draws must be in 1..10000; got 0"),
        ([], {"trials": 10**11}, "--trials must be in 1..10000; got 100000000000"),
    ],
)
def test_what_makes_no_comparison_is_refused(overrides: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexLoraError, match=message):
        study(*overrides, **changes)


@pytest.mark.parametrize(
    "overrides",
    [
        ["clients.counts={type1: 20}", "data.num_clients=20"],
        ["clients.ranks_from=devices", "devices.profiles=built_in"],
        ["data.validation_examples=0"],
        ["rounds.patience=3"],
    ],
)
def test_the_configurations_own_ranks_and_stops_are_taken(overrides: list[str]) -> None:
    assert study(*overrides, tuning_draws=0).distributions == ("configured",)


def test_a_configuration_file_that_changes_later_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(Path(DEMO).read_text())
    of = make_study(path, ["training.batch_size=3"], read_arms("aligned"), draws=1, distributions=["normal"])
    path.write_text("nonsense: [")
    config = draw_config(of, Job("test", 0, 1007, "normal", "aligned", 0.1), of.arms[-1])
    expected = load_config(
        DEMO,
        [
            "training.batch_size=3",
            "seed=1007",
            "model.num_processes=1",
            "clients.distribution=normal",
            "method={name: aligned}",
        ],
    )
    assert config == expected


@pytest.mark.parametrize("entry", ["flexlora:clients=all", "fedit:clients=", "x=aligned:clients=type5"])
def test_ranks_of_a_client_type_that_does_not_exist_are_refused_with_those_that_do(entry: str) -> None:
    with pytest.raises(FlexLoraError, match="or a client type, one of type1, type2, type3, type4; got"):
        study(methods=entry)


def test_the_reference_is_an_arm_that_is_there() -> None:
    assert reference_of(study(), None) == "fedit_smallest"
    assert reference_of(study(methods="aligned,flexlora", with_controls=False), None) == "aligned"
    with pytest.raises(FlexLoraError, match="one of aligned; got fedit_smallest"):
        reference_of(study(methods="aligned", with_controls=False), "fedit_smallest")


def test_controls_have_the_ranks_of_the_distribution_even_where_a_draw_lacks_a_type() -> None:
    types = four_types(1, 4, 16)
    clients = [ClientSpec(str(n), types[name], 10, "c", "") for n, name in enumerate(["type2", "type2", "type3"])]
    shapes = {"self_attn.q_proj": (8, 8), "mlp.up_proj": (8, 8)}
    loaded: Any = SimpleNamespace(
        config=load_config(DEMO),
        shapes=shapes,
        participants=SimpleNamespace(clients=clients, plans={name: types[name] for name in ("type2", "type3")}),
    )
    arms = by_label(controls())

    def ranks(label: str) -> list[set[int]]:
        found = clients_of(arms[label], loaded, ("type1", "type2", "type3", "type4"))
        return [set(client.plan.resolve(shapes).values()) for client in found]

    assert ranks("fedit_smallest") == [{1}] * 3
    assert ranks("fedit_largest") == [{16}] * 3
    assert ranks("centralised") == [{16}]
    (arm,) = read_arms("fedit:clients=type2")
    assert [client.plan for client in clients_of(arm, loaded, ("type1",))] == [types["type2"]] * 3
    assert not arm.depends_on_ranks
    # Nobody affords the largest rank here; those with the largest that occurs train.
    assert ranks("large_alone") == [{4, 16}]


def test_pooled_training_has_no_simulated_device_and_as_many_steps_as_a_cohort() -> None:
    config = load_config(DEMO, ["rounds.cohort_size=3", "training.max_steps=4"])
    clients = [ClientSpec(str(n), four_types(1, 4, 16)["type1"], 100, "c", "phone") for n in range(5)]
    loaded: Any = SimpleNamespace(
        config=config, participants=SimpleNamespace(clients=clients), model=None, train_one=None
    )
    parts: dict[str, Any] = {field.name: None for field in dataclasses.fields(Loop)}
    federation = Federation([], {}, {}, {}, Scaling("rslora", 1.0), compression=Compression(4))
    loop = pooled(Loop(**(parts | {"clock": "a clock", "federation": federation})), loaded)
    engine: Any = loop.engine
    assert loop.clock is None and loop.federation.compression is None
    assert engine.settings.max_steps == 3 * 4
