"""The format of a destination: a named format with the settings of `message`, or a custom body."""

from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from relay.config.message import MessageConfig
from relay.config.problems import KeyPath, SettingError, guess, shown
from relay.config.schema import DestinationConfig
from relay.config.secrets import Absent
from relay.formats.envelope import Format
from relay.formats.services import SERVICES, MessageFormat
from relay.formats.template import compile_body

TEMPLATE = "template"
"""The name of the format of a destination with `template`."""


def format_of(config: DestinationConfig, formats: Mapping[str, Format]) -> Format:
    """Return the format of a destination; `formats` are the known ones by name.

    Raises:
        SettingError: a key does not fit.
    """
    if config.template is not None:
        body = compile_body(config.template, config.content_type)
        return Format(name=TEMPLATE, content_type=body.content_type, render=body.render)
    format_ = formats[config.format]
    return format_.with_settings(config.message) if isinstance(format_, MessageFormat) else format_


def is_shared(config: DestinationConfig) -> bool:
    """Return whether the format renders an event for every destination alike."""
    return config.template is None and config.message == MessageConfig()


def problems_of(config: DestinationConfig, formats: Mapping[str, Format]) -> Iterator[tuple[KeyPath, str]]:
    """Yield each key of a destination that does not fit its format, and why."""
    if config.template is None and config.content_type is not None:
        yield ("content_type",), "needs `template`; a format has its own content type"
    if config.format not in formats:
        advice = guess(config.format, formats) or f"; known: {', '.join(formats)}"
        yield ("format",), f"unknown format {shown(config.format)}{advice}"
        return
    if config.message != MessageConfig() and (
        config.template is not None or not isinstance(formats[config.format], MessageFormat)
    ):
        yield ("message",), f"needs a message format: {', '.join(each.name for each in SERVICES)}"
    try:
        format_ = format_of(config, formats)
    except SettingError as error:
        yield error.key, str(error)
        return
    if config.group_by is not None and format_.group is None:
        can = ", ".join(name for name, each in formats.items() if each.group is not None)
        yield ("group_by",), f'"{format_.name}" has one body for each event; these formats can group: {can}'


def warnings_of(config: DestinationConfig, formats: Mapping[str, Format]) -> Iterator[tuple[KeyPath, str]]:
    """Yield warnings about valid settings that are probably mistakes; they never contain the URL."""
    format_ = formats.get(config.format)
    if config.template is None and isinstance(format_, MessageFormat) and format_.path:
        path = urlsplit(config.url.reveal()).path or "/"
        ends = path == "/" if format_.path == "/" else path.endswith(format_.path)
        if not ends and not isinstance(config.url, Absent):
            expected = f"the URLs of {format_.name} end with {format_.path}"
            if format_.path == "/":
                expected = "the URL of an ntfy server has no path; set the topic in `message`"
            yield ("url",), expected
