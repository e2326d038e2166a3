"""Salted hashes of subjects."""

import hashlib
import hmac
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from refusals import refused

from nnunet_autoreg.corpus.identity import SALT_NAME, load_salt, salted
from nnunet_autoreg.errors import UsageError


def test_a_hash_is_the_head_of_hmac_sha256_under_the_salt() -> None:
    # 16 of 64 digits: 64 bits are enough to keep subjects apart.
    expected = hmac.new(b"s", b"PAT 7", hashlib.sha256).hexdigest()

    assert salted("PAT 7", "s") == expected[:16]


def test_padding_does_not_count_and_unknown_stays_unknown() -> None:
    # DICOM pads values to an even length with a space or a zero byte.
    assert salted("7 ", "s") == salted("7\0", "s") == salted("7", "s")
    assert salted("", "s") == salted("  ", "s") == ""


def test_another_salt_gives_another_hash() -> None:
    assert salted("7", "s") != salted("7", "t")


def test_names_that_are_not_utf8_are_hashed_too() -> None:
    # "\udcfc" is how Python keeps the byte 0xfc (a Latin-1 umlaut) that it could not decode.
    assert len(salted("M\udcfcller", "s")) == 16


def test_the_salt_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    salt = load_salt(tmp_path / "store")

    assert load_salt(tmp_path / "store") == salt
    assert len(salt) == 64
    assert stat.S_IMODE((tmp_path / "store" / SALT_NAME).stat().st_mode) == 0o600
    assert load_salt(tmp_path / "other") != salt
    # No temporary file is left behind.
    assert [p.name for p in (tmp_path / "store").iterdir()] == [SALT_NAME]


def test_processes_that_race_get_one_salt(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        salts = list(pool.map(load_salt, [tmp_path] * 64))

    assert len(set(salts)) == 1


def test_a_damaged_salt_is_refused(tmp_path: Path) -> None:
    (tmp_path / SALT_NAME).write_text("abc")

    with refused(UsageError, "salt-damaged", tmp_path / SALT_NAME, 3):
        load_salt(tmp_path)

    (tmp_path / SALT_NAME).write_bytes(b"\xff")

    with refused(UsageError, "salt-unreadable", tmp_path / SALT_NAME):
        load_salt(tmp_path)
