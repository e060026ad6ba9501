"""TLS from files that may be replaced at any time: every new connection has what they hold then.

Nothing is restarted for a new certificate. Servers look at the files at each handshake, clients read them for
each connection that they open. A connection that is open stays as it is.
"""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from laps.logs import get_logger
from laps.setting import SettingsError

if TYPE_CHECKING:
    from laps.settings import Settings

SYSTEM_CA = "system"
"""As `tls_ca`: the authorities that the operating system trusts."""

log = get_logger()


@dataclass(frozen=True, slots=True)
class Loaded:
    """The contents of the files, PEM."""

    certificates: bytes
    key: bytes
    authorities: bytes


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files; `certificate` and `key` are empty for a client that shows none."""

    certificate: str
    key: str
    authorities: str
    """By these the other side is known; `system`, or empty for a server that asks for no certificate."""

    @classmethod
    def of_service(cls, settings: Settings) -> TlsFiles | None:
        """What a service uses on all its links; None: it speaks in the clear.

        Raises:
            SettingsError: only a part is set, or a file cannot be used.
        """
        if not (settings.tls_cert or settings.tls_key):
            return None
        for name in ("tls_cert", "tls_key", "tls_ca"):
            if not getattr(settings, name):
                raise SettingsError(f"{name}: must be set together with tls_cert, tls_key and tls_ca")
        files = cls(settings.tls_cert, settings.tls_key, settings.tls_ca)
        files.check()
        return files

    @classmethod
    def of_edge(cls, settings: Settings) -> TlsFiles | None:
        """What a gateway shows its clients; None: it serves them in the clear. Without `authorities`
        clients are not asked for certificates.

        Raises:
            SettingsError: only a part is set, or a file cannot be used.
        """
        if bool(settings.edge_tls_cert) != bool(settings.edge_tls_key):
            raise SettingsError("edge_tls_key: must be set together with edge_tls_cert")
        certificate, key = (
            settings.edge_tls_cert or settings.tls_cert,
            settings.edge_tls_key or settings.tls_key,
        )
        if not certificate:
            if settings.edge_tls_ca:
                raise SettingsError("edge_tls_ca: needs edge_tls_cert or tls_cert")
            return None
        files = cls(certificate, key, settings.edge_tls_ca)
        files.check()
        return files

    @classmethod
    def of_client(cls, settings: Settings) -> TlsFiles | None:
        """What a client of the gateway uses; None: it speaks in the clear."""
        if not settings.tls_ca:
            return None
        files = cls(settings.tls_cert, settings.tls_key, settings.tls_ca)
        files.check()
        return files

    def load(self) -> Loaded:
        """Raises OSError when a file cannot be read."""
        return Loaded(
            Path(self.certificate).read_bytes() if self.certificate else b"",
            Path(self.key).read_bytes() if self.key else b"",
            b"" if self.authorities in ("", SYSTEM_CA) else Path(self.authorities).read_bytes(),
        )

    def fingerprint(self) -> tuple[tuple[int, int, int], ...]:
        """Differs when a file has been replaced. Raises OSError."""
        # stat follows links: a Secret's volume in Kubernetes is replaced by turning one.
        found = []
        for path in (self.certificate, self.key, self.authorities):
            if path and path != SYSTEM_CA:
                stat = Path(path).stat()
                found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return tuple(found)

    def check(self) -> None:
        """Raises SettingsError when the files are not certificates with their key."""
        try:
            # First, for its errors name the file.
            self.load()
            self.ssl_context(ssl.Purpose.CLIENT_AUTH)
        except (OSError, ValueError) as error:
            raise SettingsError(f"tls_cert, tls_key, tls_ca: cannot be used: {error}") from None

    def ssl_context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        """For what does not speak gRPC. Raises OSError (ssl.SSLError is one)."""
        context = ssl.create_default_context(purpose)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.authorities not in ("", SYSTEM_CA):
            context.load_verify_locations(self.authorities)
        if self.certificate:
            context.load_cert_chain(self.certificate, self.key or None)
        return context


def channel_credentials(files: TlsFiles | None) -> grpc.ChannelCredentials | None:
    """What the files hold now, for one channel. None: in the clear. Raises OSError."""
    if files is None:
        return None
    loaded = files.load()
    return grpc.ssl_channel_credentials(
        loaded.authorities or None, loaded.key or None, loaded.certificates or None
    )


def server_credentials(files: TlsFiles, *, ask_clients: bool) -> grpc.ServerCredentials:
    """`ask_clients`: only clients with a certificate of our authorities get through. Raises OSError."""
    source = _ServerCertificates(files, ask_clients)
    # The stubs do not know that the fetcher may say None, for nothing new.
    return grpc.dynamic_ssl_server_credentials(source.present, source.newer, ask_clients)  # type: ignore[arg-type]


class _ServerCertificates:
    """Gives gRPC what the files hold, at each handshake. Called in gRPC's threads."""

    def __init__(self, files: TlsFiles, ask_clients: bool) -> None:
        self._files = files
        self._ask_clients = ask_clients
        self._lock = threading.Lock()
        self._seen = files.fingerprint()
        self.present = self._configuration()

    def newer(self) -> grpc.ServerCertificateConfiguration | None:
        """None: nothing has changed."""
        with self._lock:
            try:
                seen = self._files.fingerprint()
                if seen == self._seen:
                    return None
                # Half-replaced files do not fit each other; the next handshake looks again.
                self._files.ssl_context(ssl.Purpose.CLIENT_AUTH)
                fresh = self._configuration()
            except (OSError, ValueError) as error:
                log.error("new certificate not usable, the old one stays", error=str(error))
                return None
            self._seen = seen
            log.info("certificate replaced", certificate=self._files.certificate)
            return fresh

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        loaded = self._files.load()
        authorities = loaded.authorities if self._ask_clients else None
        return grpc.ssl_server_certificate_configuration([(loaded.key, loaded.certificates)], authorities)


def http_context(files: TlsFiles, *, ask_clients: bool) -> ssl.SSLContext:
    """For an asyncio server. Each handshake has what the files hold then. Raises OSError."""
    source = _HttpCertificates(files, ask_clients)
    return source.outer


class _HttpCertificates:
    def __init__(self, files: TlsFiles, ask_clients: bool) -> None:
        self._files = files
        self._ask_clients = ask_clients
        self._seen = files.fingerprint()
        self._present = self._make()
        self.outer = self._present
        self.outer.sni_callback = self._choose

    def _make(self) -> ssl.SSLContext:
        context = self._files.ssl_context(ssl.Purpose.CLIENT_AUTH)
        if self._ask_clients:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        # Called once a handshake, whether the client names a server or not.
        try:
            seen = self._files.fingerprint()
            if seen != self._seen:
                self._present, self._seen = self._make(), seen
                log.info("certificate replaced", certificate=self._files.certificate, by="http")
        except (OSError, ValueError) as error:
            log.error("new certificate not usable, the old one stays", error=str(error))
        connection.context = self._present
