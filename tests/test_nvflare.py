"""The aggregator, with NVFlare's own messages, against stock PEFT, plain numpy and the package's methods themselves."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

pytest.importorskip("nvflare")

from nvflare import FedJob
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import ModelLearnable, make_model_learnable, model_learnable_to_dxo
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.decomposers import common_decomposers
from nvflare.app_common.shareablegenerators import FullModelShareableGenerator
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.fuel.utils import fobs

from flexlora.aggregators.registry import MethodError, method_class
from flexlora.aggregators.settings import OptionError
from flexlora.federation.messages import Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.nvflare import AdapterPersistor, FlexLoraAggregator, NvflareError, load_received, reply_of
from flexlora.rounds.checkpoint import CheckpointError

flare_decomposers.register()
common_decomposers.register()

ALPHA, MODULES = 6.0, ("wide", "tall")
RANKS = {"site-1": 1, "site-2": 2, "site-3": 4}
EXAMPLES = {"site-1": 11, "site-2": 30, "site-3": 5}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(6, 5, bias=False), nn.Linear(5, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tall(self.wide(x))


def adapted(rank: int, lora_alpha: int = int(ALPHA)) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return get_peft_model(Net(), LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=list(MODULES)))


def first_model(rank: int = 4, **meta: Any) -> ModelLearnable:
    weights = {key: value.numpy().copy() for key, value in get_peft_model_state_dict(adapted(rank)).items()}
    return make_model_learnable(weights, meta)


def trained(model: PeftModel, seed: int) -> PeftModel:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += torch.randn(parameter.shape, generator=rng)
    return model


def on_the_wire(shareable: Shareable) -> Shareable:
    return fobs.loads(fobs.dumps(shareable))


class Events:
    """Stands for the server's engine, of which the aggregator knows one thing: it takes events."""

    def __init__(self) -> None:
        self.fired: list[tuple[str, Any]] = []

    def fire_event(self, event_type: str, fl_ctx: FLContext) -> None:
        self.fired.append((event_type, fl_ctx.get_prop(FLContextKey.EVENT_DATA)))


class Server:
    """Does what ScatterAndGather does around an aggregator, with NVFlare's own classes and bytes."""

    def __init__(self, aggregator: FlexLoraAggregator, model: ModelLearnable | None = None) -> None:
        self.aggregator, self.model, self.generator = aggregator, model or first_model(), FullModelShareableGenerator()
        self.fl_ctx, self.engine, self.server_round = FLContext(), Events(), -1
        self.fl_ctx.put(ReservedKey.ENGINE, self.engine, private=True, sticky=False)

    @property
    def panics(self) -> list[str]:
        return [reason for event, reason in self.engine.fired if event == EventType.FATAL_SYSTEM_ERROR]

    def begin(self) -> Shareable:
        self.server_round += 1
        self.fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, self.model, private=True, sticky=True)
        self.fl_ctx.set_prop(AppConstants.CURRENT_ROUND, self.server_round, private=True, sticky=True)
        self.aggregator.handle_event(AppEventType.ROUND_STARTED, self.fl_ctx)
        sent = model_learnable_to_dxo(self.model).to_shareable()
        sent.set_header(AppConstants.CURRENT_ROUND, self.server_round)
        return on_the_wire(sent)

    def accept(self, site: str, reply: Shareable) -> bool:
        arrived = on_the_wire(reply)
        arrived.add_cookie(AppConstants.CONTRIBUTION_ROUND, self.server_round)
        arrived.set_peer_props({ReservedKey.IDENTITY_NAME: site})
        return self.aggregator.accept(arrived, self.fl_ctx)

    def end(self) -> None:
        result = self.aggregator.aggregate(self.fl_ctx)
        self.model = self.generator.shareable_to_learnable(on_the_wire(result), self.fl_ctx)

    def run_round(self, ranks: Mapping[str, int] = RANKS) -> dict[str, PeftModel]:
        """Let every client train from what was sent and return their models."""
        sent, models = self.begin(), {}
        for site, rank in ranks.items():
            models[site] = adapted(rank)
            load_received(models[site], FLModelUtils.from_shareable(sent))
            trained(models[site], seed=100 * self.server_round + rank)
            assert self.accept(site, FLModelUtils.to_shareable(reply_of(models[site], EXAMPLES[site])))
        self.end()
        return models


def delta_of(model: PeftModel, name: str) -> np.ndarray:
    return model.base_model.model.get_submodule(name).get_delta_weight("default").detach().double().numpy()


def global_delta(server: Server, name: str, rank: int = 4) -> np.ndarray:
    """Return the change that the first ``rank`` directions of the server's model are, in numpy."""
    A, B = (
        np.asarray(server.model["weights"][f"base_model.model.{name}.lora_{factor}.weight"], np.float64)
        for factor in "AB"
    )
    return ALPHA / 4 * B[:, :rank] @ A[:rank]


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def test_a_round_is_the_best_approximation_of_the_mean_of_what_peft_models_trained() -> None:
    server = Server(FlexLoraAggregator(ALPHA))
    for _ in range(2):
        models = server.run_round()
        sent = server.begin()
        for name in MODULES:
            deltas = {site: delta_of(model, name) for site, model in models.items()}
            mean = sum(EXAMPLES[site] * delta for site, delta in deltas.items()) / sum(EXAMPLES.values())
            np.testing.assert_allclose(global_delta(server, name), truncated(mean, 4), atol=2e-5)
            for rank in RANKS.values():
                # A client of rank r starts from the best approximation of rank r.
                client = adapted(rank)
                load_received(client, FLModelUtils.from_shareable(sent))
                np.testing.assert_allclose(delta_of(client, name), truncated(mean, rank), atol=2e-5)
    assert not server.panics and not server.aggregator.exclusions


@pytest.mark.parametrize(
    ("method", "options", "ranks"),
    [
        ("flexlora", {}, RANKS),
        ("flexlora", {"error_compensation": True, "fold_tail": True, "server_momentum": 0.5}, RANKS),
        ("aligned", {}, RANKS),
        ("aligned", {"split": "balanced", "holder_exponent": 1.0}, RANKS),
        ("zero_pad", {}, RANKS),
        ("dimension_wise", {}, RANKS),
        ("lora_fair", {}, RANKS),
        ("fedit", {}, dict.fromkeys(RANKS, 4)),
    ],
)
@pytest.mark.parametrize("scaling", ["constant_alpha", "rslora"])
def test_rounds_are_those_of_the_method_itself(
    method: str, options: dict[str, Any], ranks: dict[str, int], scaling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scaling == "rslora":
        plain = LoraConfig
        monkeypatch.setitem(globals(), "LoraConfig", lambda **settings: plain(use_rslora=True, **settings))
    server = Server(FlexLoraAggregator(ALPHA, method, options, scaling))
    rule = Scaling(scaling, ALPHA)
    direct = method_class(method)(scaling=rule, **options)
    initial = factors_of(adapted(4), rule)
    state = direct.init(initial)
    for server_round in range(3):
        updates = []
        for site, rank in ranks.items():
            sent = direct.broadcast(state, dict.fromkeys(MODULES, rank)).trainable
            rng = torch.Generator().manual_seed(100 * server_round + rank)
            noise = {name: torch.randn(value.shape, generator=rng) for name, value in lora_parameters(rank).items()}
            payload = {
                module: LoraFactors(own.A + noise[f"{module}.A"], own.B + noise[f"{module}.B"], own.scaling)
                for module, own in sent.items()
            }
            updates.append(Update(site, payload, float(EXAMPLES[site])))
        state = direct.aggregate(state, updates)
        server.run_round(ranks)
        expected = direct.broadcast(state, dict.fromkeys(MODULES, 4)).trainable
        for module, own in expected.items():
            got = server.model["weights"][f"base_model.model.{module}.lora_A.weight"]
            np.testing.assert_allclose(got, own.A.numpy(), atol=1e-3)
            got = server.model["weights"][f"base_model.model.{module}.lora_B.weight"]
            np.testing.assert_allclose(got, own.B.numpy(), atol=1e-3)


def lora_parameters(rank: int) -> dict[str, torch.Tensor]:
    """Return the factors of a model in the order in which it lists them."""
    found = {}
    for name, parameter in adapted(rank).named_parameters():
        if "lora_" in name:
            module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{module}.{rest[0]}"] = parameter
    return found


def factors_of(model: PeftModel, rule: Scaling) -> AdapterState:
    state = get_peft_model_state_dict(model)
    return {
        module: LoraFactors(
            *(state[f"base_model.model.{module}.lora_{factor}.weight"].clone() for factor in "AB"), rule(4)
        )
        for module in sorted(MODULES)
    }


def test_with_a_folded_tail_all_clients_compute_the_model_of_the_server() -> None:
    server = Server(FlexLoraAggregator(ALPHA, "aligned"))
    server.run_round()
    sent, x = server.begin(), torch.linspace(-1, 1, 24).reshape(4, 6)
    outputs = []
    for rank in RANKS.values():
        client = adapted(rank)
        load_received(client, FLModelUtils.from_shareable(sent))
        outputs.append(client(x))
    base = Net()
    base.load_state_dict(adapted(4).unload().state_dict())
    with torch.no_grad():
        for name in MODULES:
            base.get_submodule(name).weight += torch.from_numpy(global_delta(server, name)).float()
    for output in outputs:
        torch.testing.assert_close(output, base(x), rtol=1e-4, atol=1e-4)


def reply(change: Callable[[FLModel], Any] = lambda model: None) -> Shareable:
    """Return the reply of a client of rank 2, with something about it changed."""
    model = reply_of(trained(adapted(2), 5), 8)
    change(model)
    return FLModelUtils.to_shareable(model)


def weigh(value: Any) -> Callable[[FLModel], None]:
    return lambda model: model.meta.update(NUM_STEPS_CURRENT_ROUND=value)


def scale(value: Any) -> Callable[[FLModel], None]:
    return lambda model: model.meta.update(lora_scaling=value)


KEY = "base_model.model.wide.lora_A.weight"


def put(key: str, value: Any) -> Callable[[FLModel], None]:
    return lambda model: model.params.update({key: value})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (reply(put(KEY, np.full((2, 6), np.nan, np.float32))), "A must be finite; got 12"),
        (reply(put(KEY, np.full((2, 6), 1e300))), "A must be finite"),
        (reply(put(KEY, np.full((2, 6), 1e30, np.float32))), "norm of A must be below"),
        (reply(put(KEY, np.zeros((2, 7), np.float32))), "B @ A must have shape"),
        (reply(put(KEY, np.zeros((3, 6), np.float32))), "needs A"),
        (reply(put(KEY, "text")), "cannot be read as an array"),
        (reply(put("base_model.model.other.lora_A.weight", np.zeros((2, 6), np.float32))), "other: needs A"),
        (reply(put("wide.weight", np.zeros((5, 6), np.float32))), "nothing else; got 'wide.weight'"),
        (reply(lambda model: [model.params.pop(key) for key in list(model.params) if "tall" in key]), "tall: every"),
        (reply(lambda model: model.params.clear()), "at least one module"),
        (reply(weigh(None)), "NUM_STEPS_CURRENT_ROUND"),
        (reply(weigh(0)), "above 0"),
        (reply(weigh(-2)), "above 0"),
        (reply(weigh(float("nan"))), "above 0"),
        (reply(weigh("8")), "above 0"),
        (reply(weigh(float("inf"))), "above 0"),
        (reply(weigh(1e300)), "at most 2**53"),
        (reply(weigh(True)), "above 0"),
        (reply(scale(None)), "must hold 'lora_scaling'"),
        (reply(scale({"wide": 3.0, "tall": 1.5})), "tall: scaling must be 3 at rank 2"),
        (FLModelUtils.to_shareable(reply_of(adapted(5, 30), 8)), "rank must be in 1..4"),
        (DXO(DataKind.WEIGHT_DIFF, {KEY: np.zeros((2, 6))}).to_shareable(), "params_transfer_type FULL"),
        (DXO(DataKind.METRICS, {"loss": 1.0}).to_shareable(), "got <DataKind.METRICS"),
        (Shareable(), "ValueError"),
    ],
)
def test_a_reply_that_cannot_be_used_is_left_out_and_named(bad: Shareable, reason: str) -> None:
    server = Server(FlexLoraAggregator(ALPHA))
    server.begin()
    assert not server.accept("site-2", bad)
    assert server.accept("site-3", reply())
    server.end()
    ((server_round, site, why),) = server.aggregator.exclusions
    assert (server_round, site) == (0, "site-2") and reason in why
    # The round is that of the other client alone.
    expected = delta_of(trained(adapted(2), 5), "wide")
    np.testing.assert_allclose(global_delta(server, "wide"), expected, atol=1e-5)


def test_a_failed_task_an_old_round_and_a_second_reply_are_left_out() -> None:
    server = Server(FlexLoraAggregator(ALPHA))
    assert not server.accept("site-1", reply())
    server.begin()
    failed = reply()
    failed.set_return_code("EXECUTION_EXCEPTION")
    assert not server.accept("site-1", failed)
    late = reply()
    late.add_cookie(AppConstants.CONTRIBUTION_ROUND, -1)
    late.set_peer_props({ReservedKey.IDENTITY_NAME: "site-1"})
    assert not server.aggregator.accept(late, server.fl_ctx)
    assert server.accept("site-1", reply())
    assert not server.accept("site-1", reply())
    reasons = [reason for _, _, reason in server.aggregator.exclusions]
    for reason, part in zip(reasons, ("no round has begun", "return code", "belong to round 0", "second"), strict=True):
        assert part in reason


def test_one_rank_is_asked_for_where_the_method_needs_it() -> None:
    server = Server(FlexLoraAggregator(ALPHA, "fedit"))
    sent = server.begin()
    assert not server.accept("site-2", reply())
    assert "rank must be 4, for method fedit needs one; got 2" in server.aggregator.exclusions[0][2]
    with pytest.raises(NvflareError, match="rank must be 4"):
        load_received(adapted(2), FLModelUtils.from_shareable(sent))


def test_a_round_without_a_usable_reply_leaves_the_model_as_it_is() -> None:
    server = Server(FlexLoraAggregator(ALPHA))
    server.run_round()
    before = {key: value.copy() for key, value in server.model["weights"].items()}
    server.begin()
    server.end()
    assert all(np.array_equal(server.model["weights"][key], value) for key, value in before.items())
    server.begin()
    assert server.accept("site-1", reply())
    server.aggregator.reset(server.fl_ctx)
    server.end()
    assert all(np.array_equal(server.model["weights"][key], value) for key, value in before.items())


def test_replies_give_the_same_bits_in_whatever_order_they_come() -> None:
    results = []
    for sites in (list(RANKS), list(RANKS)[::-1]):
        server = Server(FlexLoraAggregator(ALPHA))
        server.run_round({site: RANKS[site] for site in sites})
        results.append(server.model["weights"])
    assert all(np.array_equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize(("method", "options"), [("flexlora", {"server_momentum": 0.5}), ("aligned", {})])
def test_a_server_that_was_restored_from_a_snapshot_goes_on_as_if_nothing_had_been(
    method: str, options: dict[str, Any]
) -> None:
    whole, cut_off = (Server(FlexLoraAggregator(ALPHA, method, options)) for _ in range(2))
    for server in (whole, cut_off):
        server.run_round()
        server.run_round()
    snapshot = fobs.loads(fobs.dumps(cut_off.aggregator.get_persist_state(cut_off.fl_ctx)))
    model = make_model_learnable(cut_off.model["weights"], cut_off.model["meta"])
    fresh = Server(FlexLoraAggregator(ALPHA, method, options), model)
    fresh.server_round = cut_off.server_round
    fresh.aggregator.restore(snapshot, fresh.fl_ctx)
    for server in (whole, fresh):
        server.run_round()
    for key, value in whole.model["weights"].items():
        np.testing.assert_array_equal(fresh.model["weights"][key], value)


def test_a_snapshot_of_another_method_is_refused_and_one_of_nothing_is_none() -> None:
    server = Server(FlexLoraAggregator(ALPHA, "aligned"))
    assert server.aggregator.get_persist_state(server.fl_ctx) == {}
    server.aggregator.restore({}, server.fl_ctx)
    server.aggregator.restore(None, server.fl_ctx)
    server.run_round()
    snapshot = server.aggregator.get_persist_state(server.fl_ctx)
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        FlexLoraAggregator(ALPHA).restore(snapshot, server.fl_ctx)
    snapshot["state.safetensors"] = snapshot["state.safetensors"][:-1]
    with pytest.raises(CheckpointError, match="damaged"):
        FlexLoraAggregator(ALPHA, "aligned").restore(snapshot, server.fl_ctx)


def test_a_model_that_was_trained_before_is_where_a_job_starts() -> None:
    before = trained(adapted(4), 3)
    model = make_model_learnable({key: value.numpy() for key, value in get_peft_model_state_dict(before).items()}, {})
    server = Server(FlexLoraAggregator(ALPHA), model)
    sent = server.begin()
    client = adapted(2)
    load_received(client, FLModelUtils.from_shareable(sent))
    for name in MODULES:
        np.testing.assert_allclose(delta_of(client, name), truncated(delta_of(before, name), 2), atol=1e-4)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (make_model_learnable({}, {}), "AdapterPersistor"),
        (make_model_learnable({"weight": np.zeros((2, 2), np.float32)}, {}), "nothing else; got 'weight'"),
        (first_model(lora_scaling={"wide": 4.0, "tall": 4.0}), "scaling must be 1.5 at rank 4"),
    ],
)
def test_a_first_model_that_cannot_be_used_ends_the_job_with_the_reason(model: ModelLearnable, reason: str) -> None:
    server = Server(FlexLoraAggregator(ALPHA), model)
    server.begin()
    (panic,) = server.panics
    assert reason in panic
    with pytest.raises(NvflareError, match="before a round has begun"):
        server.aggregator.aggregate(server.fl_ctx)


def test_a_server_rank_that_the_model_cannot_hold_ends_the_job_with_the_reason() -> None:
    options = {"server_rank": 3, "fold_tail": True}
    server = Server(FlexLoraAggregator(ALPHA, options=options), first_model(2))
    server.begin()
    assert "server_rank must be at most 2" in server.panics[0]
    server = Server(FlexLoraAggregator(ALPHA, options=options))
    server.run_round()
    assert not server.panics


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "fedsa_lora"}, "method 'fedsa_lora'.*keep a part"),
        ({"method": "fed_plora"}, "of its own"),
        ({"method": "flora"}, "base weights"),
        ({"method": "ffa_lora"}, "not both factors"),
        ({"method": "ra_flora"}, "not the first directions"),
        ({"options": {"split": "balanced"}}, "not the first directions"),
        ({"options": {"momentum": 1}}, "options of flexlora: momentum: .*; got 1"),
        ({"options": {"server_learning_rate": -1, "server_rank": 0}}, "server_rank: .*; got 0"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"scaling": "dense"}, "scaling must be one of"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(NvflareError, match=reason):
        FlexLoraAggregator(**{"lora_alpha": ALPHA, **settings})


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(OptionError, match=r"method\.energy"):
        FlexLoraAggregator(ALPHA, options={"spare_directions": 3})


def test_a_method_that_there_is_not_is_refused() -> None:
    with pytest.raises(MethodError, match="did you mean flexlora"):
        FlexLoraAggregator(ALPHA, "flexlorra")


def test_a_job_names_the_components_with_their_settings_and_takes_the_adapter_along(tmp_path: Path) -> None:
    adapted(4).save_pretrained(tmp_path / "first")
    job = FedJob("rounds")
    job.to_server(FlexLoraAggregator(ALPHA, "aligned", {"fold_tail": False}, "rslora"))
    job.to_server(AdapterPersistor(str(tmp_path / "first")), id="mine")
    job.export_job(str(tmp_path / "jobs"))
    (app,) = (tmp_path / "jobs" / "rounds").glob("app*")
    components = json.loads((app / "config" / "config_fed_server.json").read_text())["components"]
    assert [(one["id"], one["path"].rpartition(".")[2]) for one in components] == [
        ("aggregator", "FlexLoraAggregator"),
        ("mine", "AdapterPersistor"),
    ]
    settings = {"lora_alpha": ALPHA, "method": "aligned", "options": {"fold_tail": False}, "scaling": "rslora"}
    assert components[0]["args"] == settings
    assert FlexLoraAggregator(**settings).options == {"fold_tail": False}
    files = {path.relative_to(app / "custom").as_posix() for path in (app / "custom").rglob("*") if path.is_file()}
    assert files >= {"initial_adapter/adapter_config.json", "initial_adapter/adapter_model.safetensors"}
    assert not [name for name in files if name.endswith(".py")]


def test_what_is_returned_is_a_model_of_whole_weights() -> None:
    server = Server(FlexLoraAggregator(ALPHA))
    server.begin()
    dxo = from_shareable(server.aggregator.aggregate(server.fl_ctx))
    assert dxo.data_kind == DataKind.WEIGHTS and dxo.data.keys() == first_model()["weights"].keys()


def test_the_job_of_the_page_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "nvflare.md").read_text(encoding="utf-8")
    script = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    adapted(16).save_pretrained("first-adapter")
    Path("client.py").write_text("import nvflare.client as flare\n", encoding="utf-8")
    exec(script.replace('job.simulator_run("workspace")', 'job.export_job("jobs")'), {})
    apps = sorted(path.name for path in (tmp_path / "jobs" / "rounds").iterdir() if path.is_dir())
    assert apps == ["app_server", "app_site-1", "app_site-2"]
    client = json.loads((tmp_path / "jobs/rounds/app_site-2/config/config_fed_client.json").read_text())
    assert client["executors"][0]["executor"]["args"]["task_script_args"] == "--rank 16"
