"""Message formats: one message as the JSON that a chat, push or paging service takes.

Services differ in markup and in the limits for a message and its parts. The texts of a `Message` are bounded
so that each stays below the limits of every service; the functions below bound the whole message. A text of
a sender never becomes markup and never notifies people.
"""

import html
import re
from collections.abc import Callable, Mapping
from typing import Any

from relay.base.clock import SECOND, rfc3339
from relay.base.json_text import encode
from relay.config.message import COMMON, MessageConfig
from relay.config.problems import SettingError
from relay.formats.envelope import Format
from relay.formats.message import Message, MessageWriter, moment
from relay.formats.own_events import Level

Page = Callable[[Message, MessageConfig], Any]

SLACK_TEXT = 3000
"""Characters of a text in a section (docs.slack.dev, "Section block"). A message may be ten times as long."""

DISCORD_TOTAL = 6000
"""Characters of all texts of an embed (docs.discord.com, "Embed limits"); a description has up to 4,096."""

TEAMS_BYTES = 28 * 1024
"""Bytes of a message (learn.microsoft.com, "Limits and specifications for Microsoft Teams")."""

TELEGRAM_TEXT = 4096
"""UTF-16 units of a text after its tags are removed (core.telegram.org/bots/api, "sendMessage")."""

NTFY_BYTES = 4096
"""Bytes of a message; a longer one becomes an attachment (docs.ntfy.sh/publish, "Limitations")."""

PAGERDUTY_SUMMARY, PAGERDUTY_KEY = 1024, 255
"""Characters of `payload.summary` and of `dedup_key` (developer.pagerduty.com, "Send an alert event")."""

_COLOURS: Mapping[Level, int] = {
    "good": 0x2EB67D, "info": 0x36C5F0, "warning": 0xECB22E, "error": 0xE01E5A, "critical": 0xE01E5A,
}  # fmt: skip
_PRIORITIES: Mapping[Level, int] = {"good": 3, "info": 2, "warning": 3, "error": 4, "critical": 5}
_SEVERITIES: Mapping[Level, str] = {
    "good": "info", "info": "info", "warning": "warning", "error": "error", "critical": "critical",
}  # fmt: skip
_TAGS: Mapping[Level, str] = {
    "good": "white_check_mark", "info": "information_source", "warning": "warning", "error": "red_circle",
    "critical": "rotating_light",
}  # fmt: skip
_INLINE = 40  # characters of a value that Discord shows beside others
_MARKDOWN = re.compile(r"([\\*_~`|>#\[\]()<:@-])")


class MessageFormat(Format, frozen=True, kw_only=True):
    """A format for people; `message = {…}` of a destination changes its texts and fields."""

    page: Page
    keys: frozenset[str] = frozenset()  # of `message`, besides those that all message formats have
    required: tuple[str, ...] = ()  # those that must be given
    path: str = ""  # the end of the URL's path at the service; "": any
    can_group: bool = True

    def with_settings(self, config: MessageConfig) -> Format:
        """Return the format for one destination.

        Raises:
            SettingError: a key of `message` is wrong, missing, or of another format.
        """
        for key in config.__struct_fields__:
            if getattr(config, key) is not None and key not in COMMON and key not in self.keys:
                owners = ", ".join(each.name for each in SERVICES if key in each.keys)
                raise SettingError(f'belongs to format = "{owners}", not to "{self.name}"', "message", key)
        for key in self.required:
            if getattr(config, key) is None:
                raise SettingError(f'missing; format = "{self.name}" needs it', "message", key)
        writer, page = MessageWriter(config), self.page
        return Format(
            name=self.name,
            content_type=self.content_type,
            render=lambda event: encode(page(writer.write(event), config)),
            group=(lambda events: encode(page(writer.write_group(events), config)))
            if self.can_group
            else None,
        )


def _service(
    name: str,
    page: Page,
    *,
    keys: tuple[str, ...] = (),
    required: tuple[str, ...] = (),
    path: str = "",
    can_group: bool = True,
) -> MessageFormat:
    """Return a format that also works without settings, if it requires none."""
    writer, usual = MessageWriter(MessageConfig()), MessageConfig()
    return MessageFormat(
        name=name,
        content_type="application/json",
        render=lambda event: encode(page(writer.write(event), usual)),
        group=(lambda events: encode(page(writer.write_group(events), usual))) if can_group else None,
        page=page,
        keys=frozenset(keys),
        required=required,
        path=path,
        can_group=can_group,
    )


# --- Slack ----------------------------------------------------------------------------------------------


def _slack(message: Message, _: MessageConfig) -> Any:
    """Return blocks, and their content as text for notifications and for services that do not support blocks.

    Such services, Mattermost among them, find names after an @ in the text; a word joiner prevents that.
    """
    blocks: list[dict[str, Any]] = [{"type": "header", "text": _plain(message.heading)}]
    body = "\n".join((message.text, *(f"• {line}" for line in message.lines))).strip()
    if body:
        blocks.append({"type": "section", "text": _plain(_within(body, SLACK_TEXT))})
    for at in range(
        0, len(message.fields), 5
    ):  # a section has at most ten texts: a label and a value for each
        texts = []
        for label, value in message.fields[at : at + 5]:
            texts += [
                {"type": "mrkdwn", "text": f"*{_escape_slack(label)}*", "verbatim": True},
                _plain(value),
            ]
        blocks.append({"type": "section", "fields": texts})
    footer = [f"<!date^{message.at // SECOND}^{{date_short_pretty}} {{time_secs}}|{moment(message.at)}>"]
    footer += [f"`{message.command}`"] if message.command else [f"`{message.id}`"]
    footer += [f"<{_escape_slack(message.link)}|Open>"] if message.link else []
    blocks.append({"type": "context", "elements": [{"type": "mrkdwn", "text": text} for text in footer]})
    text = _escape_slack(_within("\n".join(_lines(message)), SLACK_TEXT)).replace("@", "@\u2060")
    return {"text": text, "blocks": blocks, "unfurl_links": False, "unfurl_media": False}


def _plain(text: str) -> dict[str, Any]:
    """Return a text that Slack shows unchanged: without markup, mentions or links."""
    return {"type": "plain_text", "text": text, "emoji": False}


def _escape_slack(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _lines(message: Message) -> list[str]:
    """Return a message as lines of plain text, without its time."""
    lines = [message.heading, message.text, *(f"• {line}" for line in message.lines)]
    lines += [f"{label}: {value}" for label, value in message.fields]
    return [line for line in (*lines, message.command, message.link) if line]


# --- Discord --------------------------------------------------------------------------------------------


def _discord(message: Message, _: MessageConfig) -> Any:
    lines = [
        _escape_markdown(line) for line in (message.text, *(f"• {line}" for line in message.lines)) if line
    ]
    description = _without_half_an_escape(_within("\n".join(lines), 3000))
    if message.command:
        description += f"\n`{message.command}`"
    fields, room = [], DISCORD_TOTAL - 256 - _units(description) - _units(message.id)
    for label, value in message.fields:
        field = {
            "name": _escape_markdown(label),
            "value": _escape_markdown(value),
            "inline": len(value) <= _INLINE,
        }
        room -= _units(str(field["name"])) + _units(str(field["value"]))
        if room >= 0:
            fields.append(field)
    embed = {
        "title": _without_half_an_escape(_within(_escape_markdown(message.heading), 256)),
        "description": description.strip(),
        "fields": fields,
        "timestamp": rfc3339(message.at),
        "footer": {"text": message.id},
        "color": None if message.level is None else _COLOURS[message.level],
        "url": message.link,
    }
    no_mentions: dict[str, list[str]] = {"parse": []}  # a sender's @everyone must notify no one
    return {"embeds": [_without_empty(embed)], "allowed_mentions": no_mentions}


def _escape_markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text)


def _without_half_an_escape(text: str) -> str:
    """Return a text that was cut, without a backslash at its end that escapes nothing."""
    slashes = len(text.removesuffix("…")) - len(text.removesuffix("…").rstrip("\\"))
    return f"{text.removesuffix('…')[:-1]}…" if slashes % 2 else text


# --- Teams ----------------------------------------------------------------------------------------------


def _teams(message: Message, _: MessageConfig) -> Any:
    """Return an Adaptive Card, as the workflow "When a Teams webhook request is received" takes it.

    Its texts are `TextRun`s, which do not support Markdown.
    """
    body = [_runs((message.heading, {"size": "Large", "weight": "Bolder"}))]
    body += [_runs((text, {})) for text in (message.text, *(f"• {line}" for line in message.lines)) if text]
    for label, value in message.fields:
        body.append(_runs((f"{label}: ", {"weight": "Bolder"}), (value, {})))
    if message.command:
        body.append(_runs((message.command, {"fontType": "Monospace"})))
    body.append(_runs((f"{moment(message.at)} · {message.id}", {"isSubtle": True, "size": "Small"})))
    card: dict[str, Any] = {
        "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
        "type": "AdaptiveCard",
        "version": "1.4",
        "body": body,
        "msteams": {"width": "Full"},
    }
    if message.link:
        card["actions"] = [{"type": "Action.OpenUrl", "title": "Open", "url": message.link}]
    attachment = {
        "contentType": "application/vnd.microsoft.card.adaptive",
        "contentUrl": None,
        "content": card,
    }
    return {"type": "message", "attachments": [attachment]}


def _runs(*texts: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    runs = [{"type": "TextRun", "text": text, **style} for text, style in texts]
    return {"type": "RichTextBlock", "inlines": runs}


# --- Telegram -------------------------------------------------------------------------------------------


def _telegram(message: Message, config: MessageConfig) -> Any:
    """Return a message in HTML. Names and mentions do not work in `<code>` or after a joiner."""
    room = TELEGRAM_TEXT - 200  # for the texts of title, command, time and link
    parts = [f"<b>{_escape_telegram(message.heading)}</b>"]
    for text in filter(None, (message.text, *(f"• {line}" for line in message.lines))):
        room -= 2 * _units(text) + 1  # joiners count, too
        if room >= 0:
            parts.append(_escape_telegram(text))
    for label, value in message.fields:
        room -= _units(label) + _units(value) + 3
        if room >= 0:
            parts.append(f"<b>{_escape_telegram(label)}:</b> <code>{html.escape(value, quote=False)}</code>")
    if message.command:
        parts.append(f"<code>{html.escape(message.command, quote=False)}</code>")
    footer = f"<i>{moment(message.at)}</i>"
    if message.link:
        footer += f' · <a href="{html.escape(message.link)}">Open</a>'
    body = {
        "chat_id": None if config.chat_id is None else config.chat_id.reveal(),
        "message_thread_id": config.thread_id,
        "text": "\n".join((*parts, footer)),
        "parse_mode": "HTML",
        "link_preview_options": {"is_disabled": True},
    }
    return _without_empty(body)


def _escape_telegram(text: str) -> str:
    """Escape for HTML; a word joiner keeps Telegram from finding mentions, tags, commands and links."""
    return html.escape(re.sub(r"(?<=[@#/.])(?=\w)", "\u2060", text), quote=False)


# --- ntfy -----------------------------------------------------------------------------------------------


def _ntfy(message: Message, config: MessageConfig) -> Any:
    """Return a message as JSON (docs.ntfy.sh/publish, "Publish as JSON"): plain text with its title."""
    lines = [message.text, *(f"• {line}" for line in message.lines)]
    lines += [f"{label}: {value}" for label, value in message.fields]
    text = "\n".join(line for line in (*lines, message.command) if line)
    tags = config.tags
    if tags is None and message.level is not None:
        tags = (_TAGS[message.level],)
    priority = config.priority
    if priority is None and message.level is not None:
        priority = _PRIORITIES[message.level]
    body = {
        "topic": None if config.topic is None else config.topic.reveal(),
        "title": message.title,
        "message": _within_bytes(text or message.about or message.title, NTFY_BYTES - 100),
        "tags": tags,
        "priority": priority,
        "click": message.link,
    }
    return _without_empty(body)


# --- PagerDuty ------------------------------------------------------------------------------------------


def _pagerduty(message: Message, config: MessageConfig) -> Any:
    """Return an event of the Events API v2. A solved problem resolves its alert."""
    key = message.key or message.id
    if len(key) > PAGERDUTY_KEY:
        key = f"{key[: PAGERDUTY_KEY - 33]}-{message.id[-32:]}"
    severity = config.severity or (_SEVERITIES[message.level] if message.level is not None else "error")
    details = dict(message.fields) | ({"Details": message.text} if message.text else {})
    details |= {"Next": message.command} if message.command else {}
    body = {
        "routing_key": None if config.routing_key is None else config.routing_key.reveal(),
        "event_action": "resolve" if message.is_over else "trigger",
        "dedup_key": key,
        "client": "hookferry",
        "client_url": message.link,
        "links": [{"href": message.link, "text": "Open"}] if message.link else None,
        "payload": {
            "summary": _within(message.line if message.text else message.title, PAGERDUTY_SUMMARY),
            "source": message.source,
            "severity": severity,
            "timestamp": rfc3339(message.at),
            "class": message.about,
            "custom_details": {"Event": message.id, "Type": message.about, **details},
        },
    }
    return _without_empty(body)


# --- all ------------------------------------------------------------------------------------------------


def _within(text: str, most: int) -> str:
    """Return a text of at most `most` UTF-16 units, which all services count at most."""
    if _units(text) <= most:
        return text
    return text.encode("utf-16-le")[: 2 * (most - 1)].decode("utf-16-le", "ignore") + "…"


def _within_bytes(text: str, most: int) -> str:
    raw = text.encode("utf-8", "replace")
    return text if len(raw) <= most else raw[: most - 3].decode("utf-8", "ignore") + "…"


def _units(text: str) -> int:
    return len(text.encode("utf-16-le", "replace")) // 2


def _without_empty(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value not in (None, "", [], ())}


SERVICES: tuple[MessageFormat, ...] = (
    _service("slack", _slack),
    _service("discord", _discord),
    _service("teams", _teams),
    _service(
        "telegram",
        _telegram,
        keys=("chat_id", "thread_id"),
        required=("chat_id",),
        path="/sendMessage",
    ),
    _service("ntfy", _ntfy, keys=("topic", "priority", "tags"), required=("topic",), path="/"),
    _service(
        "pagerduty",
        _pagerduty,
        keys=("routing_key", "severity", "dedup_key"),
        required=("routing_key",),
        path="/v2/enqueue",
        can_group=False,  # PagerDuty groups alerts itself, and resolves them one by one
    ),
)
"""The formats for people."""
