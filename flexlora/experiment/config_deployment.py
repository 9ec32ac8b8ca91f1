"""Defines the ``deployment`` section of a configuration: how a server treats real clients on machines of their own."""

from pydantic import Field

from flexlora.experiment.config_section import Section


class DeploymentConfig(Section):
    """What a server of real clients waits for and scores on; simulations have no use for it."""

    min_clients: int = Field(default=2, ge=1, description="Clients that must be connected before the first round.")
    wait_seconds: float = Field(
        default=600.0, gt=0, description="How long the server waits for them; then it ends with an error."
    )
    rejoin_seconds: float = Field(
        default=60.0, ge=0, description="How long a round waits for a client of its cohort that is not connected."
    )
    deadline_seconds: float | None = Field(
        default=None, gt=0, description="Seconds after which a round goes on without clients still at work; null waits."
    )
    over_selection: float = Field(
        default=1.0,
        ge=1,
        le=100,
        description="Clients asked for each client of the cohort; above 1 a round takes the first updates to come.",
    )
    scored_on: str | None = Field(
        default=None,
        description=(
            "File or folder of rows of the server's own to score adapters on, each value of `data.label_column` a "
            "task. Null takes the unseen tasks of `data` where the server makes or holds them, else scores nothing."
        ),
    )
