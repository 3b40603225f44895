"""Redis over TLS: certificates are checked, the app's own context is used, and the bus works as without."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator

import pytest

from asgi_cluster import Cluster, StoreUnavailable
from loadtest.ports import free_port
from tests.sessions.app import client_for
from tests.support.machine import LOCAL, self_signed
from tests.support.servers import debian_binary
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A self-signed certificate for loopback, and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"), f"IP:{LOCAL}")


@pytest.fixture(scope="module")
def secured(authority: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``host:port`` of Debian's redis-server, TLS only (the embedded Valkey is built without)."""
    certificate, key = authority
    port = free_port()
    server = subprocess.Popen(
        [
            *(debian_binary(), "--port", "0", "--tls-port", str(port), "--bind", LOCAL, "--save", ""),
            *("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no"),
            *("--dir", str(tmp_path_factory.mktemp("data"))),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        yield f"{LOCAL}:{port}"
    finally:
        server.terminate()
        server.wait(10)


async def reached(cluster: Cluster) -> None:
    """The server needs a moment to listen."""

    async def starts() -> bool:
        try:
            await cluster.__aenter__()
        except StoreUnavailable as error:
            if "refused" in str(error).lower() or "111" in str(error):
                return False
            raise
        return True

    await eventually(starts, timeout=10)


@pytest.mark.parametrize("how", ["ssl_context", "ssl_ca_certs"])
async def test_tls_carries_sessions_and_the_bus(
    secured: str, authority: tuple[str, str], prefix: str, how: str
) -> None:
    """Two nodes, a login on one, a logout on the other, with the context given or made from the URL."""
    if how == "ssl_context":
        context = ssl.create_default_context(cafile=authority[0])
        nodes = [Cluster(f"rediss://{secured}/0", prefix=prefix, ssl_context=context) for _ in range(2)]
    else:
        url = f"rediss://{secured}/0?ssl_ca_certs={authority[0]}"
        nodes = [Cluster(url, prefix=prefix) for _ in range(2)]
    for node in nodes:
        await reached(node)
    async with client_for(nodes[0]) as a, client_for(nodes[1]) as b:
        await a.post("/login?user=ada")
        b.cookies = a.cookies
        assert (await b.get("/show")).json()["user"] == "ada"
        assert (await b.post("/logout")).json() == {"sessions": 1, "complete": True, "acked": 2}
        assert (await a.get("/show")).json()["user"] is None
    for node in nodes:
        await node.__aexit__(None, None, None)


async def test_tls_refuses_a_certificate_that_nobody_vouches_for(
    secured: str, authority: tuple[str, str], prefix: str
) -> None:
    """The start fails and says that it is about the certificate."""
    known = Cluster(f"rediss://{secured}/0?ssl_ca_certs={authority[0]}", prefix=prefix)
    await reached(known)
    await known.__aexit__(None, None, None)
    with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
        await Cluster(f"rediss://{secured}/0", prefix=prefix).__aenter__()


def test_context_without_tls_is_refused() -> None:
    """It would be ignored, and that is never done."""
    with pytest.raises(ValueError, match="rediss"):
        Cluster("redis://localhost/0", ssl_context=ssl.create_default_context())
