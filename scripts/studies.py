"""Defines the studies behind docs/results.md: what each asks, and of what runs it consists."""

from collections.abc import Mapping
from dataclasses import dataclass

FOUR_DISTRIBUTIONS = ("uniform", "heavy_tail_light", "heavy_tail_strong", "normal")

_MORE_HELD_OUT = ("data.validation_examples=256", "data.num_unseen_tasks=128")

RUNS = ("rounds.num_rounds=30", "rounds.cohort_size=12", "training.batch_size=4", *_MORE_HELD_OUT)
"""The federation of the demo for some more rounds, scored on more text."""

LONG_RUNS = ("rounds.num_rounds=40", "rounds.cohort_size=24", "training.max_steps=4")
"""Five times the examples of ``RUNS``."""

RUNS_OF_SMOLLM2 = ("data.validation_examples=128",)
"""A real model, some minutes a run on two cores. ``datasets/`` holds what is not ours, or links to it."""

RATES_OF_MAIN = "rank_1=fedit:clients=type1@0.048,rank_16=fedit:clients=type4@0.024,flexlora@0.024,aligned@0.024"
"""Arms at the learning rates that the main study chose on heavy_tail_strong."""

COMPENSATED = "compensated=flexlora:error_compensation=true:fold_tail=true"


@dataclass(frozen=True)
class StudySpec:
    """One study.

    Attributes:
        title: Heading of its section.
        question: What it answers.
        methods: As for ``flexlora compare --methods``.
        distributions: Of client types.
        draws: Paired draws that count.
        overrides: Settings that all runs share.
        tuning_draws: Draws that choose learning rates.
        trials: Most learning rates tried for each arm.
        tune_on: Distribution whose tuning draws choose for all; None chooses for each.
        reference: Arm that differences are paired with.
        with_controls: Whether the controls run too.
        text: Whether answers are generated and scored.
        evaluations: Points of each learning curve.
        config: Path of the configuration.
        shares: Study of the same settings whose rows count here too, for the arms and distributions of both.
        in_verdict: Whether the first paragraph of the page of results rests on it.
    """

    title: str
    question: str
    methods: str
    distributions: tuple[str, ...]
    draws: int
    overrides: tuple[str, ...] = RUNS
    tuning_draws: int = 1
    trials: int = 4
    tune_on: str | None = None
    reference: str = "fedit_smallest"
    with_controls: bool = True
    text: bool = True
    evaluations: int = 4
    config: str = "configs/study.yaml"
    shares: str | None = None
    in_verdict: bool = False


def _of_smollm2(title: str, question: str, data: str, config: str, *overrides: str) -> StudySpec:
    """Return a study of a real model; its data lie below ``datasets/``."""
    return StudySpec(
        title,
        question,
        "flexlora,aligned",
        ("heavy_tail_light", "heavy_tail_strong"),
        draws=4,
        overrides=(f"data.path={data}", *RUNS_OF_SMOLLM2, *overrides),
        tune_on="heavy_tail_strong",
        evaluations=2,
        config=config,
    )


def _of_collapse(title: str, question: str, *overrides: str) -> StudySpec:
    """Return a study of what a change of the main study's federation does to the order, with two of its controls."""
    return StudySpec(
        title,
        question,
        f"rank_1=fedit:clients=smallest,rank_16=fedit:clients=largest,flexlora,{COMPENSATED},aligned",
        ("heavy_tail_light", "heavy_tail_strong"),
        draws=4,
        overrides=(*RUNS, *overrides),
        tune_on="heavy_tail_strong",
        reference="rank_1",
        with_controls=False,
        text=False,
    )


def _of_paper(title: str, question: str, methods: str, distribution: str, *overrides: str) -> StudySpec:
    """Return a study of the settings of another of the paper's tables or figures; arms with a rate are not tuned."""
    return StudySpec(
        title,
        question,
        methods,
        (distribution,),
        draws=4,
        overrides=(*RUNS, *overrides),
        reference="rank_1",
        with_controls=False,
        text=False,
    )


STUDIES: Mapping[str, StudySpec] = {
    "main": StudySpec(
        "The paper's methods, plain and with FlexLoRA, and ours",
        "Do mixed ranks beat FedIT at the smallest rank, and how near do they come to FedIT at the largest?",
        "fedavg=fedavg:start=2.0,slora=slora:stage_two=fedit,fedavg_flexlora=flexlora:training.optimizer=sgd:start=2.0,flexlora,"
        f"slora_flexlora=slora:stage_two=flexlora,{COMPENSATED},aligned",
        FOUR_DISTRIBUTIONS,
        draws=8,
        in_verdict=True,
    ),
    "methods": StudySpec(
        "All methods at one distribution",
        "Where do the other methods stand when every rank is equally frequent?",
        f"flexlora,{COMPENSATED},aligned,zero_pad,het_lora,dimension_wise,lora_fair,ffa_lora,rolora,flora,fedex_lora,florist,"
        "ra_flora,fed_svd,fed_sb,fed_plora,fs_lora,fedsa_lora",
        ("uniform",),
        draws=4,
        shares="main",
    ),
    "long": StudySpec(
        "Longer runs",
        "Does the order hold for five times the examples, where rank collapse has had time?",
        "fedavg=fedavg:start=1.0,slora=slora:stage_two=fedit,fedavg_flexlora=flexlora:training.optimizer=sgd:start=1.0,flexlora,"
        f"slora_flexlora=slora:stage_two=flexlora,{COMPENSATED},aligned=aligned:holder_exponent=0.0,"
        "aligned_half=aligned:holder_exponent=0.5",
        FOUR_DISTRIBUTIONS,
        draws=8,
        overrides=LONG_RUNS,
        evaluations=8,
    ),
    "aligned": StudySpec(
        "What makes aligned averaging work",
        "Which weights, which split, how often to decompose, and how large a server step? And if all have rank 16?",
        f"flexlora,{COMPENSATED},aligned,"
        "between=aligned:holder_exponent=0.5,holders=aligned:holder_exponent=1.0,"
        "balanced=aligned:split=balanced,nested=aligned:decompose_every=null,every_5=aligned:decompose_every=5,"
        "no_fold=aligned:fold_tail=false,larger_step=aligned:server_learning_rate=1.5,rank_16=aligned:clients=largest",
        ("heavy_tail_strong",),
        draws=4,
        reference="aligned",
        shares="main",
    ),
    "scaling": StudySpec(
        "Scaling rules under one shared learning rate",
        "Fixed lora_alpha, constant ratio, or rsLoRA?",
        "aligned,constant_alpha=aligned:lora.scaling=constant_alpha:lora.lora_alpha=4,"
        "constant_ratio=aligned:lora.scaling=constant_ratio:lora.lora_alpha=1,"
        "flexlora,flexlora_constant_alpha=flexlora:lora.scaling=constant_alpha:lora.lora_alpha=4,"
        "flexlora_constant_ratio=flexlora:lora.scaling=constant_ratio:lora.lora_alpha=1",
        ("uniform",),
        draws=4,
        reference="aligned",
        shares="main",
    ),
    "small_cohorts": _of_collapse(
        "Small cohorts",
        "Does the order hold when few clients take part in a round?",
        "rounds.num_rounds=90",
        "rounds.cohort_size=4",
    ),
    "constant_rate": _of_collapse(
        "Rank collapse and the schedule of the learning rate",
        "Does a constant learning rate keep the directions alive that coverage takes away?",
        "training.schedule=constant",
    ),
    "fig1": _of_paper(
        "Figure 1: few large clients",
        "Nine in ten clients at rank 1, one in twenty each at rank 4 and 16: is FlexLoRA near FedIT at larger ranks?",
        "rank_1=fedit:clients=type1,rank_4=fedit:clients=type2,rank_16=fedit:clients=type4,flexlora,aligned",
        "extreme_heavy_tail",
    ),
    "fig5_100": _of_paper(
        "Figure 5: a hundred clients",
        "Does the order hold where the same cohorts are drawn from a hundred clients, not nineteen hundred?",
        RATES_OF_MAIN,
        "heavy_tail_strong",
        "data.num_clients=100",
    ),
    "fig5_400": _of_paper(
        "Figure 5: four hundred clients",
        "And from four hundred?",
        RATES_OF_MAIN,
        "heavy_tail_strong",
        "data.num_clients=400",
    ),
    "uplink": StudySpec(
        "What travels: rounded updates and secure sums",
        "What do updates of 8 and 4 bits cost in loss, and sums that hide every update?",
        "aligned@0.024,bits_8=aligned:rounds.upload_bits=8@0.024,bits_4=aligned:rounds.upload_bits=4@0.024,"
        "feedback=aligned:rounds.upload_bits=4:rounds.error_feedback=true@0.024,"
        "secure=aligned:privacy.secure_sum={}@0.024,flexlora@0.024,"
        "flexlora_4=flexlora:rounds.upload_bits=4@0.024,flexlora_secure=flexlora:privacy.secure_sum={}@0.024",
        ("heavy_tail_strong",),
        draws=4,
        tuning_draws=0,
        reference="aligned",
        with_controls=False,
        text=False,
    ),
    "table9": _of_paper(
        "Table 9: adapters on attention alone",
        "What do ranks buy where only the attention has adapters?",
        "rank_1=fedit:clients=type1,rank_16=fedit:clients=type4,flexlora,aligned",
        "uniform",
        "lora.target_modules=[q_proj, k_proj, v_proj, o_proj]",
    ),
    "demo": StudySpec(
        "What rank is worth in the demo",
        "Is rank a limit within the demo's three minutes? FedIT with every client at rank 1 and at rank 16, "
        "each at its rate in the demo, and the demo's method.",
        "rank_1=fedit:clients=smallest@0.048,rank_16=fedit:clients=largest@0.024,aligned@0.024",
        ("heavy_tail_strong",),
        draws=4,
        overrides=(),
        tuning_draws=0,
        reference="rank_1",
        with_controls=False,
        text=False,
        evaluations=8,
        config="configs/demo.yaml",
    ),
    "smoke": StudySpec(
        "A dry run",
        "Does everything run from end to end?",
        "flexlora,aligned",
        ("heavy_tail_strong",),
        draws=1,
        overrides=("rounds.num_rounds=2", "rounds.cohort_size=4", "training.max_steps=1", "data.num_clients=60"),
        trials=1,
        text=False,
    ),
    "ten_times": StudySpec(
        "Ten times the rounds",
        "Does the order hold at 400 rounds?",
        f"flexlora@0.012,{COMPENSATED}@0.012,aligned@0.012",
        ("heavy_tail_strong",),
        draws=2,
        overrides=("rounds.num_rounds=400", "rounds.cohort_size=24", "training.max_steps=4"),
        tuning_draws=0,
        evaluations=8,
        text=False,
    ),
    "smollm2_instructions": _of_smollm2(
        "A real model on Super-Natural Instructions",
        "Do mixed ranks beat FedIT at the smallest rank on a model of 135 million parameters and real tasks?",
        "datasets/natural-instructions",
        "configs/smollm2_natural_instructions.yaml",
        "data.num_unseen_tasks=60",
    ),
    "smollm2_dolly": _of_smollm2(
        "A real model on Dolly",
        "And where 200 clients have rows of one file, with labels by a Dirichlet distribution?",
        "datasets/databricks-dolly-15k.jsonl",
        "configs/smollm2_dolly.yaml",
    ),
}
