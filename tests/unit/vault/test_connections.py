"""vault.connections: what a TLS connection to the vault is held to, whatever the environment says."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from tokenward.vault.connections import TlsFiles


def test_session_keys_are_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    assert TlsFiles().context().keylog_filename is None
    assert not (tmp_path / "keys").exists()


def test_chain_and_name_are_verified_with_nothing_older_than_tls_1_2() -> None:
    made = TlsFiles().context()
    assert (made.verify_mode, made.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert made.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert made.cert_store_stats()["x509_ca"] > 0, "the system's CAs"


def test_a_ca_file_is_the_only_one_believed(tmp_path: Path) -> None:
    empty = tmp_path / "ca.pem"
    empty.write_text("")
    with pytest.raises(OSError):  # noqa: PT011 -- the ssl module has no text worth pinning
        TlsFiles(ca_file=str(empty)).context()
