"""Whose KV is whose: what the warehouse is told of a tenant.

A *tenant* is the secret that `HttpSettings.tenant` makes of an API key; empty where no keys are asked for. From it
follow

    salt    part of the fingerprint: hash chains of two tenants have different roots and never meet, in no tier
    label   who stored an extent, in its header and in plain sight; what a purge goes by

Both are digests keyed by the tenant, so that the one does not give away the other. They are the same after a restart.
"""

import hashlib
import hmac

_LABEL_DIGITS = 16


def salt_of(tenant: str) -> str:
    """What the tenant's fingerprints are salted with; empty for the one tenant of a server without keys."""
    return _digest(tenant, "salt") if tenant else ""


def label_of(tenant: str) -> str:
    """What the tenant's extents are labelled with, 16 hex digits; empty for the one tenant of a server without keys."""
    return _digest(tenant, "label")[:_LABEL_DIGITS] if tenant else ""


def _digest(tenant: str, purpose: str) -> str:
    return hmac.new(tenant.encode("utf-8"), f"tokenloft {purpose}".encode(), hashlib.sha256).hexdigest()
