"""The implementations of the public listener, for tests that run with each of them."""

from typing import get_args

from relay.ingest.implementation import Implementation

IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
WIRE = {
    "test_budget", "test_compression", "test_connection", "test_dedupe", "test_envelopes", "test_http",
    "test_http_samples", "test_ingest", "test_sign_of_life", "test_wide_contract",
}  # fmt: skip
"""Modules of tests that speak HTTP to the public listener: each test runs with both implementations."""

FAST_ONLY = "test_the_fast_listener_"
"""Prefix of the names of tests that concern the fast listener only."""

current: Implementation = "fast"  # the implementation that `daemons.write_config` configures
