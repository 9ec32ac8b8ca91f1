"""The environment of processes that talk to a server on their own machine."""

import httpx
import pytest

pytest.importorskip("flwr")

from flexlora.engines.flower.children import reach_directly


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "https://127.0.0.1:9440"), ("::1", "https://[::1]:9440"), ("localhost", "http://localhost:9440")],
)
def test_no_proxy_stands_before_a_server_of_this_machine(monkeypatch: pytest.MonkeyPatch, host: str, url: str) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://proxy.example.org:3128")
    monkeypatch.setenv("NO_PROXY", "intranet.example.org")
    monkeypatch.setenv("no_proxy", "")
    reach_directly(host)
    with httpx.Client() as client:
        direct, proxied = (client._transport_for_url(httpx.URL(one)) for one in (url, "https://fed.example.org"))
        assert direct is client._transport
        assert proxied is not client._transport
