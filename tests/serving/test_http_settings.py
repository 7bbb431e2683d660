from serving.http_settings import HttpSettings, hash_api_key

KEYS = HttpSettings(api_key_hashes=frozenset({hash_api_key("one"), hash_api_key("clé")}))


def as_header(key: str) -> str:
    """As Starlette decodes what a client has sent in UTF-8."""
    return f"Bearer {key}".encode().decode("latin-1")


def test_each_key_is_a_tenant() -> None:
    tenants = {KEYS.tenant(as_header(key)) for key in ("one", "clé")}
    assert len(tenants) == 2
    assert "" not in tenants
    assert not any(key in tenant for key in ("one", "clé") for tenant in tenants)
    assert KEYS.tenant(as_header(" one ")) == KEYS.tenant("bearer one")


def test_without_keys_there_is_one_tenant() -> None:
    assert {HttpSettings().tenant(header) for header in ("", "Bearer one", "Bearer two")} == {""}


def test_a_known_key_is_accepted() -> None:
    assert KEYS.accepts(as_header("clé"))
    assert KEYS.accepts("bearer one")
    for header in ("", "one", "Basic one", "Bearer two", "Bearer"):
        assert not KEYS.accepts(header)
    assert HttpSettings().accepts("")
