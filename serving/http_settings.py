"""Limits and keys of the HTTP edge."""

import hashlib
import hmac
from dataclasses import dataclass


@dataclass(frozen=True)
class HttpSettings:
    """See the module's docstring."""

    max_body_bytes: int = 16 * 2**20
    max_requests: int = 256
    """Requests for completions in progress, waiting or streaming; one more is told to come back later."""
    api_key_hashes: frozenset[bytes] = frozenset()
    """From `hash_api_key`; empty: no key is asked for. `/health` never asks for one."""
    retry_after_s: int = 5
    """What a client is told to wait while the model is not ready."""

    def accepts(self, authorization: str) -> bool:
        """Whether the header `authorization`, decoded as Latin-1, has a known key, or none is asked for."""
        if not self.api_key_hashes:
            return True
        scheme = authorization.partition(" ")[0]
        # Every known key is compared, so that the time taken says nothing about which one came close.
        presented = _presented_hash(authorization)
        matches = [hmac.compare_digest(presented, one) for one in self.api_key_hashes]
        return scheme.lower() == "bearer" and any(matches)

    def tenant(self, authorization: str) -> str:
        """Whose request it is, from the same header: one tenant for each key, and one for all where none is asked for.

        It is not the key and can't be turned back into it, but whoever has it can find the tenant's KV: see `tenants`.
        """
        return _presented_hash(authorization).hex() if self.api_key_hashes else ""


def _presented_hash(authorization: str) -> bytes:
    # Starlette decodes headers as Latin-1; this gives back the bytes that came.
    key = authorization.partition(" ")[2]
    return hashlib.sha256(key.strip().encode("latin-1")).digest()


def hash_api_key(key: str) -> bytes:
    """The form in which keys are kept and compared."""
    return hashlib.sha256(key.encode("utf-8")).digest()
