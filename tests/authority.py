"""A certificate authority for tests: real certificates, made by openssl on the spot."""

from __future__ import annotations

import subprocess
from pathlib import Path

# Made in no time, where a key of RSA takes half a second.
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


class Authority:
    """Signs certificates for brokers and clients; one folder, one authority."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.certificate = folder / "ca.crt"
        self.key = folder / "ca.key"
        extensions = ["-addext", "basicConstraints=critical,CA:TRUE"]
        extensions += ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
        _openssl(
            *("req", "-x509", *_KEY, "-days", "2"),
            *("-subj", f"/CN={name}", *extensions),
            *("-keyout", str(self.key), "-out", str(self.certificate)),
        )

    def issue(
        self, name: str, *, days: int = 2, host: str | None = None, begins: str | None = None
    ) -> tuple[Path, Path]:
        """A certificate and its key; for a server if it has a host, negative days are expired.

        `begins`: it is not valid before, YYYYMMDDHHMMSSZ.
        """
        key, request = self._folder / f"{name}.key", self._folder / f"{name}.csr"
        certificate, extras = self._folder / f"{name}.crt", self._folder / f"{name}.ext"
        subject = ["-subj", f"/CN={name}"]
        _openssl("req", *_KEY, *subject, "-keyout", str(key), "-out", str(request))
        kind = "IP" if host and host[0].isdigit() else "DNS"
        extras.write_text(
            f"subjectAltName={kind}:{host}\n" if host else "extendedKeyUsage=clientAuth\n"
        )
        if begins is not None:
            self._sign_ahead(request, certificate, extras, begins)
            return certificate, key
        _openssl(
            *("x509", "-req", "-in", str(request), "-out", str(certificate), "-days", str(days)),
            *("-CA", str(self.certificate), "-CAkey", str(self.key), "-CAcreateserial"),
            *("-extfile", str(extras)),
        )
        return certificate, key

    def _sign_ahead(self, request: Path, certificate: Path, extras: Path, begins: str) -> None:
        """Only `openssl ca` can say when a certificate begins, and it wants a book of all."""
        (self._folder / "index.txt").touch()
        config = self._folder / "ca.cnf"
        config.write_text(
            f"[ca]\ndefault_ca = own\n[own]\ndatabase = {self._folder}/index.txt\n"
            f"rand_serial = yes\nnew_certs_dir = {self._folder}\ndefault_md = sha256\n"
            "policy = any\n[any]\ncommonName = supplied\n"
        )
        _openssl(
            *("ca", "-batch", "-notext", "-config", str(config), "-in", str(request)),
            *("-out", str(certificate), "-extfile", str(extras), "-startdate", begins),
            *("-cert", str(self.certificate), "-keyfile", str(self.key), "-days", "99999"),
        )


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
