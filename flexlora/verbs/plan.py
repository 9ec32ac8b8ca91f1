"""The verb ``plan``: shows what a run will cost."""

from flexlora.progress import stage
from flexlora.verbs.arguments import ConfigArgument, JsonOption, OverridesArgument
from flexlora.verbs.terminal import err, hide_other_progress_bars, out, print_json, reading


def plan(config: ConfigArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Show what a run will do and what it will cost each kind of client, before any weight is loaded."""
    with reading(config):
        from flexlora.experiment.config_file import load_config

        settings = load_config(config, overrides or (), check_paths=True)
    with stage(err, "Loading libraries", hidden=as_json):
        from flexlora.experiment.estimate import estimate_experiment
        from flexlora.experiment.terminal import print_estimate

        hide_other_progress_bars()
    with stage(err, "Reading data and measuring this machine", hidden=as_json):
        estimate = estimate_experiment(settings)
    if as_json:
        print_json(estimate.to_json())
    else:
        print_estimate(out, estimate)
