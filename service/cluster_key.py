"""The secret by which routers and runners know each other."""

import hmac

from granatum.v1.errors import Unauthenticated


def check_cluster_key(given: str, key: str) -> None:
    """Raise Unauthenticated unless the caller gave the cluster's key."""
    if not hmac.compare_digest(given.encode(), key.encode()):
        raise Unauthenticated(
            "this is not the cluster key: set the same GRANATUM_CLUSTER_KEY everywhere"
        )
