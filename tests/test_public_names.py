"""Everything public can be made and used with public names alone."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

import flexlora

ROOT = Path(__file__).parents[1]
SHAPES = {"0.q_proj": (6, 4), "0.up_proj": (9, 4)}
SCALING = flexlora.Scaling("constant_alpha", 8.0)


def adapter(rank: int, seed: int = 0, scale: float = 0.1) -> flexlora.AdapterState:
    rng = torch.Generator().manual_seed(seed)
    return {
        module: flexlora.LoraFactors(
            torch.randn(rank, columns, generator=rng), scale * torch.randn(rows, rank, generator=rng), SCALING(rank)
        )
        for module, (rows, columns) in SHAPES.items()
    }


class DoublingEngine:
    """Clients that double the change they received; the one called c loses its connection."""

    def train(self, order: flexlora.RoundOrder) -> Iterator[flexlora.Update | flexlora.ClientFailure]:
        for client in order.cohort:
            if client.client_id == "c":
                yield flexlora.ClientFailure("c", "train", "connection lost")
                continue
            received: flexlora.Broadcast = order.parcels[client.plan].arrived
            payload = {
                module: flexlora.LoraFactors(own.A, 2 * own.B + 1, own.scaling)
                for module, own in received.trainable.items()
            }
            update = flexlora.Update(client.client_id, payload, float(client.num_examples), {"loss": 1.0, "steps": 1})
            for step in order.uplink:
                update = step.send(update, torch.Generator())
            yield update


class Halving:
    """Halves B on the way; the server doubles it again."""

    def send(self, update: flexlora.Update, rng: torch.Generator) -> flexlora.Update:
        return scaled(update, 0.5)

    def receive(self, updates: Iterable[flexlora.Update], rng: torch.Generator) -> Iterator[flexlora.Update]:
        for update in updates:
            yield scaled(update, 2.0)


def scaled(update: flexlora.Update, by: float) -> flexlora.Update:
    payload = {m: flexlora.LoraFactors(own.A, by * own.B, own.scaling) for m, own in update.payload.items()}
    return flexlora.Update(update.client_id, payload, update.weight, update.metrics)


class NormScorer:
    """Scores an adapter by its size."""

    def scores(self, adapter: flexlora.Broadcast | None) -> flexlora.EvaluationRecord:
        size = 0.0 if adapter is None else sum(float(f.delta().norm()) for f in adapter.trainable.values())
        score = flexlora.ScoreRecord(rouge_l=size, exact_match=0.0, loss=1.0, num_examples=1, num_tasks=1)
        return flexlora.EvaluationRecord(unseen=score, unseen_unweighted=score)

    def rank_groups(self, broadcast: Callable[[flexlora.RankPlan], flexlora.Broadcast]) -> Mapping[str, object]:
        return {}


def run_loop(folder: Path, uplink: tuple[flexlora.UplinkStep, ...] = ()) -> flexlora.Outcome:
    plans = [flexlora.RankPlan("small", (("", 1),)), flexlora.RankPlan("large", (("", 3),))]
    clients = [flexlora.ClientSpec(name, plans[number % 2], 4) for number, name in enumerate("abcd")]
    method: flexlora.Aggregator = flexlora.AGGREGATORS["flexlora"](scaling=SCALING)
    engine, scorer = DoublingEngine(), NormScorer()
    assert isinstance(engine, flexlora.Engine) and isinstance(scorer, flexlora.Evaluator)
    loop = flexlora.Loop(
        aggregator=method,
        state_types=flexlora.state_types(method),
        engine=engine,
        federation=flexlora.Federation(
            clients=clients,
            shapes=SHAPES,
            server_ranks=dict.fromkeys(SHAPES, 3),
            initial_adapter=adapter(3, scale=0.0),
            scaling=SCALING,
        ),
        settings=flexlora.RoundSettings(num_rounds=2, cohort_size=4, seed=0),
        learning_rate=lambda server_round: 1.0,
        evaluator=scorer,
        folder=folder,
        uplink=uplink,
    )
    return flexlora.run_rounds(loop)


def test_an_engine_an_evaluator_and_uplink_steps_of_ones_own_run_in_the_loop(tmp_path: Path) -> None:
    outcome = run_loop(tmp_path / "plain")
    assert (outcome.server_round, outcome.has_progress) == (2, True)
    records: list[flexlora.RoundRecord] = flexlora.read_records(str(tmp_path / "plain" / "records.jsonl"))
    assert [record.num_ok for record in records] == [0, 3, 3] and [record.num_failed for record in records] == [0, 1, 1]
    assert isinstance(Halving(), flexlora.UplinkStep)
    run_loop(tmp_path / "halved", (Halving(),))
    halved = flexlora.read_records(tmp_path / "halved" / "records.jsonl")
    assert [one.evaluation for one in halved] == [one.evaluation for one in records]


def test_an_engine_is_tried_on_an_order_made_by_hand() -> None:
    plan = flexlora.RankPlan("small", (("", 2),))
    sent = flexlora.Parcel(flexlora.Broadcast(adapter(2)), "float32")
    client = flexlora.ClientSpec("a", plan, 4)
    (update,) = DoublingEngine().train(flexlora.RoundOrder(1, 0, 1.0, "float32", (), [client], {plan: sent}))
    assert isinstance(update, flexlora.Update) and update.payload.keys() == SHAPES.keys()
    with pytest.raises(flexlora.AggregationError, match="must add up to more than 0"):
        list(flexlora.weighed(SHAPES, [flexlora.Update("a", update.payload, 0.0)]))


def test_late_changes_are_added_to_a_state() -> None:
    method = flexlora.AGGREGATORS["flexlora"](scaling=SCALING)
    state, start = method.init(adapter(3, scale=0.0)), adapter(3, scale=0.0)
    change = flexlora.Change(flexlora.Update("a", adapter(3, seed=1), 2.0), start, discount=0.5)
    spectra: Mapping[str, flexlora.Spectrum] = method.spectra(method.add_changes(state, [change]))
    for module, own in adapter(3, seed=1).items():
        torch.testing.assert_close(spectra[module].S[0], 0.5 * torch.linalg.svdvals(own.delta().double())[0])


def test_sums_of_products_are_decomposed_with_a_certificate() -> None:
    first, second = adapter(2, seed=1)["0.q_proj"], adapter(3, seed=2)["0.q_proj"]
    total = flexlora.ProductSum(*SHAPES["0.q_proj"])
    for weight, factors in ((0.25, first), (0.75, second)):
        total = flexlora.add_product(total, factors, weight)
    spectrum, certificate = flexlora.certified_decomposition(total)
    dense = 0.25 * first.delta().double() + 0.75 * second.delta().double()
    torch.testing.assert_close((spectrum.U * spectrum.S) @ spectrum.Vh, dense, atol=1e-6, rtol=1e-6)
    assert isinstance(certificate, flexlora.Certificate)
    assert len(flexlora.certified_decompositions([total], [None])) == 1
    torch.testing.assert_close(
        flexlora.spectrum_of(first).S[:2], torch.linalg.svdvals(first.delta().double())[:2], atol=1e-6, rtol=1e-5
    )


def test_adapters_are_written_read_merged_and_inspected_by_paths_as_text(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        flexlora.write_adapter(folder, adapter(2, seed), "org/base")
    merged: flexlora.MergeResult = flexlora.merge(folders, out=str(tmp_path / "merged"), exact=True)
    assert merged.to_json()
    found = flexlora.read_adapter(str(tmp_path / "merged"))
    for module in SHAPES:
        mean = (adapter(2, 0)[module].delta() + adapter(2, 1)[module].delta()) / 2
        torch.testing.assert_close(found[module].delta(), mean, atol=1e-5, rtol=1e-5)
    assert flexlora.inspect_adapter(folders[0]).to_json()


def test_the_base_in_the_package_is_found_by_its_public_name() -> None:
    folder = Path(flexlora.resolve_base_model(flexlora.EMBEDDED_BASE))
    assert (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()


def test_a_method_can_say_what_need_not_be_sent() -> None:
    mask = flexlora.SparseMask(density=0.5, seed=3)
    trainable = {
        module: flexlora.LoraFactors(flexlora.known_rows(7, module, 2, columns), torch.zeros(rows, 2), SCALING(2))
        for module, (rows, columns) in SHAPES.items()
    }
    sent = flexlora.Broadcast(
        trainable, train_factors="B", known_A=7, mask=mask, tail_penalty=flexlora.TailPenalty(weight=0.1, share=0.5)
    )
    for module, own in sent.adapter.items():
        assert int(flexlora.mask_of(mask, module, (own.B.shape[0], 2)).sum()) == own.B.shape[0]


def test_configurations_are_read_written_and_estimated(tmp_path: Path) -> None:
    rows = [json.dumps({"instruction": f"Say {number}.", "response": f"{number}"}) for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = {"name": "instructions", "path": str(tmp_path / "rows.jsonl"), "num_clients": 3}
    config = flexlora.parse_config({"data": data}, "test")
    (tmp_path / "own.yaml").write_text(flexlora.dump_config(config))
    assert flexlora.load_config(str(tmp_path / "own.yaml")) == config
    assert flexlora.Config.model_validate({"data": data}) == config
    estimate: flexlora.Plan = flexlora.plan_experiment(config)
    assert json.dumps(estimate.to_json())
    with pytest.raises(flexlora.FlexLoraError) as caught:
        flexlora.parse_config({"seed": -1}, "test")
    assert isinstance(caught.value, flexlora.ConfigError) and len(caught.value.problems) == 1


def test_a_script_of_ones_own_is_patched_by_the_name_in_the_package() -> None:
    from flexlora.engines.exchange_loop import patch

    assert flexlora.patch is patch is flexlora.trainers.patch


def test_every_public_name_is_used_in_a_test() -> None:
    pages = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("python.md", "own-method.md"))
    imported = " ".join(re.findall(r"from flexlora import ([^\n]+)", pages))
    text = Path(__file__).read_text(encoding="utf-8") + pages
    used = {*re.findall(r"flexlora\.(\w+)", text), *re.findall(r"\w+", imported)}
    # A result is what run and open_run return.
    assert set(flexlora.__all__) - used - {"RunResult", "__version__"} == set()
