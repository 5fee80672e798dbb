"""Certificates for loopback addresses, made by openssl as people make them."""

import subprocess
from pathlib import Path


def make_certificate(folder: Path, name: str, days: int = 2, kind: str = "ec") -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1 and its key, as files; `kind` of key is ec, or such as rsa:2048."""
    folder.mkdir(exist_ok=True)
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-newkey", kind),
            *(("-pkeyopt", "ec_paramgen_curve:prime256v1") if kind == "ec" else ()),
            *("-days", str(days), "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key
