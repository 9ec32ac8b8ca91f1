"""Reads the first model of an NVFlare job from a PEFT adapter folder, and writes each round's into another one."""

from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants

from flexlora.adapters.folder import open_adapter, read_adapter
from flexlora.adapters.write import write_adapter
from flexlora.engines.nvflare.cut import CutRule
from flexlora.engines.nvflare.params import SCALINGS_KEY, adapter_in, params_of, scalings_of

SHIPPED_FOLDER = "initial_adapter"
"""Folder within a job's own files to which the first adapter is copied when the job is exported or submitted."""

RESULT_FOLDER = "adapter"
"""Folder within the job's results where the last aggregate is."""


class AdapterPersistor(ModelPersistor):
    """The server's adapter as PEFT folders: no pickle, and every tool reads the result.

    Attributes:
        adapter: Folder of the first adapter.
    """

    def __init__(self, adapter: str) -> None:
        """Build a persistor.

        Args:
            adapter: PEFT adapter folder at the largest rank of any client, as ``model.save_pretrained`` writes it. A
                job made with NVFlare's Job API takes a copy along; another one needs the folder on the server.
        """
        super().__init__()
        self.adapter = adapter

    def add_to_fed_job(self, job: Any, ctx: Any, **kwargs: Any) -> str:
        """Add this component and a copy of the adapter to a job, none of this package's code; NVFlare calls it."""
        job.check_kwargs(args_to_check=kwargs, args_expected={})
        job.set_app_packages([*job.job.app_packages, "flexlora"])
        job.add_file_source(self.adapter, SHIPPED_FOLDER, None, ctx)
        return job.add_component(ctx.comp_id or AppConstants.DEFAULT_PERSISTOR_ID, self, ctx)

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """Return the first adapter.

        Raises:
            AdapterError: If the folder holds no plain LoRA adapter.
        """
        adapter = read_adapter(self._source(fl_ctx))
        return make_model_learnable(params_of(adapter), {SCALINGS_KEY: scalings_of(adapter)})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Write the aggregate as a PEFT folder that replaces the one before, whole or not at all."""
        rule = CutRule.from_meta(model[ModelLearnableKey.META])
        with open_adapter(self._source(fl_ctx)) as first:
            base, revision = first.base_model or "", first.settings["revision"]
        folder = Path(fl_ctx.get_workspace().get_result_root(fl_ctx.get_job_id())) / RESULT_FOLDER
        folder.parent.mkdir(parents=True, exist_ok=True)
        adapter = adapter_in(model[ModelLearnableKey.WEIGHTS], rule.scaling)
        write_adapter(folder, adapter, base, ranks="exact", revision=revision)
        self.log_info(fl_ctx, f"Saved the adapter to {folder}")

    def _source(self, fl_ctx: FLContext) -> Path:
        """Return the folder of the first adapter: that in the job, if it has one."""
        shipped = Path(fl_ctx.get_workspace().get_app_custom_dir(fl_ctx.get_job_id())) / SHIPPED_FOLDER
        return shipped if shipped.is_dir() else Path(self.adapter)
