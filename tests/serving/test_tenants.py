"""What follows from an API key, and what does not."""

from dataclasses import replace

from cache.fingerprint import Fingerprint
from serving.http_settings import HttpSettings, hash_api_key
from serving.tenants import label_of, salt_of

KEYS = HttpSettings(api_key_hashes=frozenset({hash_api_key("one"), hash_api_key("two")}))
ONE, TWO = KEYS.tenant("Bearer one"), KEYS.tenant("Bearer two")
PLAIN = Fingerprint("weights", "config", "float32", "float32", 16)


def test_each_key_has_a_root_of_its_own_and_the_same_one_after_a_restart() -> None:
    roots = {replace(PLAIN, tenant_salt=salt_of(tenant)).root_hash() for tenant in (ONE, TWO, "")}
    assert len(roots) == 3
    # Written down: blocks on disk are found again only as long as this stays as it is.
    assert salt_of(ONE) == "3f2c41aba9198667c77f2307fdbbef9c45be11338fba4fa7df2546acbfa697b2"
    assert label_of(ONE) == "90839f6dd68426f7"


def test_without_keys_nothing_is_salted() -> None:
    assert (salt_of(""), label_of("")) == ("", "")
    assert replace(PLAIN, tenant_salt=salt_of("")).root_hash() == PLAIN.root_hash()


def test_no_secret_can_be_seen() -> None:
    salted = replace(PLAIN, tenant_salt=salt_of(ONE))
    assert salt_of(ONE) not in repr(salted)
    assert label_of(ONE) != label_of(TWO)
    for secret in ("one", ONE, salt_of(ONE)):
        assert secret not in label_of(ONE)
        assert label_of(ONE) not in secret
