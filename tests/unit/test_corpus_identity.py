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
    assert salted("PAT 7", "s") == hmac.new(b"s", b"PAT 7", hashlib.sha256).hexdigest()[:16]


def test_padding_does_not_count_and_unknown_stays_unknown() -> None:
    assert salted("7 ", "s") == salted("7\0", "s") == salted("7", "s")
    assert salted("", "s") == salted("  ", "s") == ""


def test_another_salt_gives_another_hash() -> None:
    assert salted("7", "s") != salted("7", "t")


def test_names_that_are_no_utf8_are_hashed_too() -> None:
    assert len(salted("M\udcfcller", "s")) == 16


def test_the_salt_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    salt = load_salt(tmp_path / "store")

    assert load_salt(tmp_path / "store") == salt and len(salt) == 64
    assert stat.S_IMODE((tmp_path / "store" / SALT_NAME).stat().st_mode) == 0o600
    assert load_salt(tmp_path / "other") != salt
    assert [p.name for p in (tmp_path / "store").iterdir()] == [SALT_NAME]


def test_processes_that_race_get_one_salt(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(load_salt, [tmp_path] * 64))) == 1


def test_a_damaged_salt_is_refused(tmp_path: Path) -> None:
    (tmp_path / SALT_NAME).write_text("abc")

    with refused(UsageError, "salt-damaged", tmp_path / SALT_NAME, 3):
        load_salt(tmp_path)

    (tmp_path / SALT_NAME).write_bytes(b"\xff")

    with refused(UsageError, "salt-unreadable", tmp_path / SALT_NAME):
        load_salt(tmp_path)
