"""Shows in a terminal what a client does: when it is connected, at which rank it takes part, each round as it comes."""

from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flexlora.experiment.client_order import ClientSetup
from flexlora.progress import stage_bars
from flexlora.text import bytes_text, count_text, number_text, printable, seconds_text

if TYPE_CHECKING:
    # A screen is shown before Flower is imported.
    from flexlora.engines.flower.client_loop import News


class ClientScreen:
    """Shows news of a client: lines that stay, and in a terminal a bar that moves while something is going on."""

    def __init__(self, console: Console, setup: ClientSetup) -> None:
        self._console, self._setup = console, setup
        self._bars = stage_bars(console, hidden=False)
        self._task = self._bars.add_task("starting", total=None, detail="")
        self._is_waiting = False

    def __enter__(self) -> "ClientScreen":
        order = self._setup.order
        self._print(f"Client {order.client_id}, data {order.data}", "bold cyan")
        self._bars.start()
        self._show("connecting", self._setup.server)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, news: "News") -> None:
        """Take one piece of news."""
        if news.what == "waiting" and not self._is_waiting:
            self._is_waiting = True
            self._print(f"{news.reason}; trying again until it answers", "yellow")
            self._show("waiting", self._setup.server)
        elif news.what == "lost":
            self._is_waiting = True
            self._print(f"Connection lost: {news.reason}; connecting again", "yellow")
            self._show("connecting", self._setup.server)
        elif news.what == "connected":
            self._is_waiting = False
            how = "without TLS" if self._setup.authority is None else "over TLS"
            self._print(f"Connected to {self._setup.server} {how}.")
            self._show("waiting", "for the server")
        elif news.what == "asked":
            self._show_work(news)
        elif news.what == "answered":
            self._print_reply(news)
            self._show("waiting", "for the server")
        elif news.what == "over":
            self._print("The run is over.", "bold cyan")

    def _show_work(self, news: "News") -> None:
        fields = news.asked.fields
        if news.asked.kind == "describe":
            self._show("loading", "libraries, base model and data")
        else:
            self._show(f"round {fields.get('server_round')}", f"training  received {bytes_text(news.down_bytes)}")

    def _print_reply(self, news: "News") -> None:
        replied, fields = news.replied, news.replied.fields
        if replied.kind == "description":
            plan: Any = fields.get("plan")
            self._print(
                f"Takes part at {plan['name']} with {count_text(fields['num_examples'], 'example')} on "
                f"{fields['device']}."
            )
        elif replied.kind == "update":
            loss = fields.get("metrics", {}).get("loss")
            self._print(
                f"  round {fields['server_round']}: trained in {seconds_text(news.seconds)}, loss "
                f"{number_text(loss, 3)}, received {bytes_text(news.down_bytes)}, sent {bytes_text(news.up_bytes)}"
            )
        elif replied.kind == "failure" and news.asked.kind != "describe":
            self._print(f"  round {fields.get('server_round')}: failed: {fields.get('reason')}", "yellow")

    def _show(self, description: str, detail: str) -> None:
        self._bars.update(self._task, description=description, detail=detail)

    def _print(self, line: str, style: str | None = None) -> None:
        self._console.print(printable(line), style=style, highlight=False, markup=False, soft_wrap=True)
