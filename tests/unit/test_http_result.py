"""The result labels of attempts, and the texts of errors."""

from relay.delivery.http.result import of_failure, of_status, one_line
from relay.model import RESULTS


def test_every_status_has_a_result_of_the_closed_list():
    assert {of_status(status) for status in range(1000)} == {"ok", "3xx", "4xx", "429", "5xx", "protocol"}
    assert set(RESULTS) > {of_status(status) for status in range(1000)}


def test_an_error_of_an_unknown_class_has_a_result():
    result, text = of_failure(RuntimeError("odd"))
    assert (result, "odd" in text) == ("protocol", True)


def test_an_error_is_one_short_printable_line():
    assert one_line("a\r\n\tb  c\x1b[0m\u202e") == "a b c?[0m?"
    assert len(one_line("x" * 10_000)) == 300
