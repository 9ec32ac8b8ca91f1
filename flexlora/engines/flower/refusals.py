"""Says why a client and a server did not come together, and what to do about it."""

import re

import httpx
from flwr.supercore.error import ApiErrorCode, FlowerError

from flexlora.errors import FlexLoraError

_UNKNOWN_KEY_STATUS, _STRANGER_STATUS = 412, 401


class LostError(FlexLoraError, ConnectionError):
    """A server that cannot be reached at present, or has forgotten this client; connecting again may help."""


class RefusedError(FlexLoraError, PermissionError):
    """A server that does not let this client in, or is not the one that is meant."""


class RunOverError(FlexLoraError, RuntimeError):
    """A run that has ended; its server takes nothing more for it."""


class UnknownKeyError(RefusedError):
    """A server that does not know the key of this client, or has a client with that key."""


def refusal(error: Exception, address: str, is_tls: bool) -> FlexLoraError:
    """Return what a failed request means, as an error with the fix.

    Args:
        error: Of the HTTP client.
        address: The server, as HOST:PORT.
        is_tls: Whether the client asked for TLS.
    """
    text = str(error)
    if isinstance(error, httpx.HTTPStatusError):
        return _answered(error, address)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return RefusedError(_wrong_certificate(text, address))
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
        return RefusedError(
            f"the server at {address} speaks no TLS; start the server with certificates, or the client with --insecure "
            "if nobody else can listen on the way"
        )
    if isinstance(error, httpx.RemoteProtocolError) and not is_tls:
        return RefusedError(
            f"the server at {address} speaks TLS; start the client with --ca and --key, without --insecure"
        )
    if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return RefusedError(f"--server must be HOST:PORT, as fed.example.org:9440; got {address}")
    reason = re.sub(r"^\[.*?\]\s*", "", text) or type(error).__name__
    return LostError(f"there is no answer from {address} ({reason})")


def _answered(error: httpx.HTTPStatusError, address: str) -> FlexLoraError:
    status, told = error.response.status_code, FlowerError.from_json(error.response.text)
    if told is not None and told.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
        return RunOverError(f"the run at {address} is over")
    if status == _UNKNOWN_KEY_STATUS:
        return UnknownKeyError(
            f"the server at {address} does not know the key of this client, or a client with that key is connected: "
            "put its public key (NAME.pub) into the folder clients of the server's certificates, or give each client "
            "a key of its own"
        )
    if status == _STRANGER_STATUS:
        return LostError(
            f"the server at {address} does not know this client any more, or the clocks of the two machines differ by "
            "more than 5 minutes"
        )
    body = " ".join(error.response.text.split())[:300]
    if status in (403, 404, 405):
        return RefusedError(
            f"the server at {address} answers {status} ({body}); use the version of Flower that the server has, and "
            "the port that flexlora server shows"
        )
    return LostError(f"the server at {address} answers {status} ({body})")


def _wrong_certificate(text: str, address: str) -> str:
    host = address.rpartition(":")[0]
    if "mismatch" in text:
        return (
            f"the certificate of the server at {address} is not for {host}; call it by a name in it, or make "
            f"one by: flexlora certificates --renew --host {host}"
        )
    if "expired" in text or "not yet valid" in text:
        return (
            f"the certificate of the server at {address} is not valid now; make a new one by: flexlora certificates "
            "--renew, and look at the clocks of both machines"
        )
    return (
        f"the certificate of the server at {address} was not signed by the authority in --ca; take ca.pem from the "
        "server's folder of certificates. If it is that file, somebody else answers in the server's place"
    )
