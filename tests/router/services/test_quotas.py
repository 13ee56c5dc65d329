"""What one router carries at a time."""

import pytest

from granatum.router.services.quotas import CallBounds, Quotas
from granatum.v1.errors import Overloaded

BOUNDS = CallBounds(streams=5, streams_per_tenant=3, bytes_per_tenant=100)


def refusal(quotas: Quotas, tenant: str, size: int) -> str:
    with pytest.raises(Overloaded) as caught:
        quotas.acquire(tenant, size)
    assert caught.value.retry_after_s
    return caught.value.reason


def test_each_bound_is_named_and_refuses_only_what_exceeds_it() -> None:
    quotas = Quotas(BOUNDS)
    for _ in range(3):
        quotas.acquire("acme", 10)
    assert refusal(quotas, "acme", 10) == "TENANT_STREAMS"
    quotas.acquire("globex", 90)
    assert refusal(quotas, "globex", 11) == "TENANT_BYTES"
    quotas.acquire("globex", 10)
    assert refusal(quotas, "initech", 1) == "ROUTER_STREAMS"


def test_what_is_released_may_be_acquired_again() -> None:
    quotas = Quotas(BOUNDS)
    for _ in range(100):
        quotas.acquire("acme", 60)
        assert refusal(quotas, "acme", 60) == "TENANT_BYTES"
        quotas.release("acme", 60)
    assert quotas.streams == 0


def test_one_request_is_taken_whatever_its_size() -> None:
    Quotas(BOUNDS).acquire("acme", 101)
