"""The server's adapter as folders, read with stock PEFT, and within NVFlare's own workspace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare")

from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import make_model_learnable
from peft import get_peft_model_state_dict

from flexlora.adapters.peft_format import AdapterError
from flexlora.engines.nvflare.cut import CutRule
from flexlora.engines.nvflare.params import NvflareError
from flexlora.engines.nvflare.persistor import AdapterPersistor
from flexlora.lora.factors import Scaling

Maker = Callable[..., Any]


@pytest.fixture
def fl_ctx(workspace: Any, make_engine: Maker) -> FLContext:
    context = FLContext()
    context.put(ReservedKey.ENGINE, make_engine(workspace), private=True, sticky=False)
    context.put(ReservedKey.RUN_NUM, "job-1", private=True, sticky=False)
    return context


def test_a_peft_folder_becomes_the_first_model(tmp_path: Path, make_model: Maker, fl_ctx: FLContext) -> None:
    model = make_model(4)
    model.save_pretrained(tmp_path / "first")
    loaded = AdapterPersistor(str(tmp_path / "first")).load(fl_ctx)
    stock = get_peft_model_state_dict(model)
    assert loaded["weights"].keys() == stock.keys()
    for key, value in stock.items():
        np.testing.assert_array_equal(loaded["weights"][key], value.numpy())
    assert loaded["meta"] == {"lora_scaling": {"tall": 1.5, "wide": 1.5}}


def test_the_copy_that_came_with_the_job_comes_first(
    tmp_path: Path, workspace: Any, make_model: Maker, fl_ctx: FLContext
) -> None:
    make_model(2).save_pretrained(tmp_path / "elsewhere")
    make_model(4).save_pretrained(Path(workspace.get_app_custom_dir("job-1")) / "initial_adapter")
    loaded = AdapterPersistor(str(tmp_path / "elsewhere")).load(fl_ctx)
    assert loaded["weights"]["base_model.model.wide.lora_A.weight"].shape == (4, 6)


def test_stock_peft_reads_what_was_saved(tmp_path: Path, workspace: Any, make_model: Maker, fl_ctx: FLContext) -> None:
    make_model(4).save_pretrained(tmp_path / "first")
    persistor = AdapterPersistor(str(tmp_path / "first"))
    rng = np.random.default_rng(0)
    weights = {
        key: rng.normal(size=value.shape).astype(np.float32) for key, value in persistor.load(fl_ctx)["weights"].items()
    }
    rule = CutRule(Scaling("constant_alpha", 6.0))
    for _ in range(2):  # The second round replaces the folder of the first.
        persistor.save(make_model_learnable(weights, {"flexlora": rule.to_meta()}), fl_ctx)
    read = make_model(1)
    read.load_adapter(Path(workspace.get_run_dir("job-1")) / "adapter", "saved")
    for name in ("wide", "tall"):
        A, B = (weights[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        delta = read.base_model.model.get_submodule(name).get_delta_weight("saved")
        torch.testing.assert_close(delta, torch.from_numpy(1.5 * B @ A), rtol=1e-4, atol=1e-5)


def test_a_model_of_another_aggregator_is_not_saved(tmp_path: Path, make_model: Maker, fl_ctx: FLContext) -> None:
    make_model(4).save_pretrained(tmp_path / "first")
    persistor = AdapterPersistor(str(tmp_path / "first"))
    with pytest.raises(NvflareError, match="FlexLoraAggregator"):
        persistor.save(persistor.load(fl_ctx), fl_ctx)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path, fl_ctx: FLContext) -> None:
    with pytest.raises((AdapterError, OSError), match=r"adapter_config\.json"):
        AdapterPersistor(str(tmp_path)).load(fl_ctx)
