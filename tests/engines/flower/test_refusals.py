"""What failed requests mean, in words with the fix."""

import httpx
import pytest

pytest.importorskip("flwr")

from flexlora.engines.flower.refusals import LostError, RefusedError, RunOverError, UnknownKeyError, refusal

PLACE = "fed.example.org:9440"


def answered(status: int, text: str = "") -> httpx.HTTPStatusError:
    request = httpx.Request("POST", f"https://{PLACE}")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, text=text, request=request))


@pytest.mark.parametrize(
    ("error", "is_tls", "kind", "words"),
    [
        (answered(412), True, UnknownKeyError, "does not know the key"),
        (answered(401), True, LostError, "does not know this client any more"),
        (answered(503, "The server is starting."), True, LostError, "503"),
        (answered(404), True, RefusedError, "use the version of Flower"),
        (answered(403, '{"code": 2007, "detail": "The current run status ..."}'), True, RunOverError, "is over"),
        (
            httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: Hostname mismatch"),
            True,
            RefusedError,
            "is not for fed.example.org; .* --renew --host fed.example.org",
        ),
        (
            httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer certificate"),
            True,
            RefusedError,
            "not signed by the authority in --ca",
        ),
        (
            httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate has expired"),
            True,
            RefusedError,
            "is not valid now",
        ),
        (httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER] wrong version number"), True, RefusedError, "speaks no TLS"),
        (httpx.RemoteProtocolError("Server disconnected"), False, RefusedError, "speaks TLS"),
        (httpx.RemoteProtocolError("Server disconnected"), True, LostError, "no answer"),
        (httpx.ConnectError("[Errno 111] Connection refused"), True, LostError, r"\(Connection refused\)"),
        (httpx.InvalidURL("bad"), True, RefusedError, "must be HOST:PORT"),
    ],
)
def test_each_failure_is_told_with_its_fix(error: Exception, is_tls: bool, kind: type[Exception], words: str) -> None:
    found = refusal(error, PLACE, is_tls)
    assert type(found) is kind
    with pytest.raises(kind, match=words):
        raise found
