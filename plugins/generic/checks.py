"""Checks of a generic source's settings against each other, at load."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from relay.source import FILTERS, Placeholder, SettingError, Takes, Template, parse_path, parse_template

from .keys import Keys
from .reading import WITHOUT_BODY
from .rendering import templates_in
from .settings import ApiKey, Ecdsa, Ed25519, Hmac, ReplySettings, Signed, header_name, names_in

KeyPath = tuple[str | int, ...]

REQUEST: Mapping[str, Takes] = {
    "header": "argument", "query": "argument", "path": "argument", "body": "either", "form": "argument",
    "method": "nothing", "url": "nothing", "timestamp": "nothing",
}  # fmt: skip
"""Placeholders of a request, and whether they take an argument."""

_ITEM: Mapping[str, Takes] = {"item": "either"}
_NO_FILTERS: frozenset[str] = frozenset()
_MORE: Mapping[str, Callable[[Any], Any]] = {"hmac": str}  # the real filter depends on the secrets


def check_settings(settings: Keys, scheme: Any) -> None:
    """Check settings that depend on each other; `scheme` is the record of `verify`, or None.

    Raises:
        ExceptionGroup: contains every fault, with its keys.
    """
    faults = _Checks(settings, scheme).faults
    if faults:
        raise ExceptionGroup("wrong settings", faults)


class _Checks:
    """Collects the faults of one source."""

    def __init__(self, settings: Keys, scheme: Any) -> None:
        self.faults: list[Exception] = []
        self._settings = settings
        self._given = scheme
        self._placeholders: list[Placeholder] = []
        self._names = sorted({name for path in settings.paths for name in names_in(path)})
        self._item = _ITEM if settings.events else {}
        self._check_paths()
        self._check_mapping()
        self._check_handshakes()
        self._check_credentials()
        self._check_first_of_list()

    def _fault(self, text: str, *key: str | int) -> None:
        self.faults.append(SettingError(text, *key))

    def _add(self, faults: list[SettingError], key: KeyPath) -> bool:
        """Report the faults of the record at a key; return whether it has any."""
        for fault in faults:
            self._fault(str(fault), *key, *fault.key)
        return bool(faults)

    def _check_paths(self) -> None:
        settings = self._settings
        if not settings.paths:
            self._fault('an empty list; give at least one path such as "/hooks/shop"', "path")
        for at, path in enumerate(settings.paths):
            if path in settings.paths[:at]:
                self._fault("is listed twice", "path", at)
        if not settings.methods:
            self._fault('an empty list; expected methods such as ["POST"]', "methods")
        if settings.form_field and settings.body not in ("auto", "form"):
            self._fault('needs body = "form" or "auto"', "form_field")

    def _check_mapping(self) -> None:
        settings = self._settings
        if not settings.type:
            text = 'must not be empty; write a template such as "{body:event}", or a constant text'
            self._fault(text, "type")
        if settings.events:
            template = self._check_template(settings.events, ("events",), {}, _NO_FILTERS)
            if template is not None and (template.lone is None or template.lone.kind != "body"):
                self._fault('expected the place of a list: "{body}" or "{body:items}"', "events")
        for name in ("type", "subject", "key", "timestamp", "data"):
            self._check_template(getattr(settings, name), (name,), self._item)
        for name, text in settings.context.items():
            self._check_template(text, ("context", name), self._item)
        if settings.timestamp and settings.context.get("timestamp"):
            text = "the key `timestamp` already sets this field; remove one of them"
            self._fault(text, "context", "timestamp")
        if settings.reply is not None:
            self._check_reply(settings.reply, ("reply",), {"event_id": "nothing"})

    def _check_handshakes(self) -> None:
        settings = self._settings
        for at, shake in enumerate(settings.handshakes):
            # Otherwise, strangers could get any text signed.
            may_sign = isinstance(self._given, Hmac) and shake.verified
            filters = FILTERS | {"hmac"} if may_sign else FILTERS
            for template in shake.when:
                self._check_template(template, ("handshakes", at, "when", template), {})
            self._check_template(shake.token or "", ("handshakes", at, "token"), {})
            self._check_reply(shake.reply, ("handshakes", at, "reply"), {}, filters)
            if shake.token is not None and not settings.verify_tokens:
                self._fault("missing; the token of a handshake is compared with them", "verify_tokens")
            if not shake.when and shake.method in settings.methods:
                text = f"answers every {shake.method}, so no request becomes an event; limit it with `when`"
                self._fault(text, "handshakes", at)
        if settings.verify_tokens and not any(shake.token for shake in settings.handshakes):
            self._fault("no handshake has a `token` to compare with them", "verify_tokens")

    def _check_reply(
        self, reply: ReplySettings, key: KeyPath, more: Mapping[str, Takes], filters: frozenset[str] = FILTERS
    ) -> None:
        self._add(reply.faults(), key)
        self._check_template(reply.text or "", (*key, "text"), more, filters)
        for name, template in reply.headers.items():
            self._check_template(template, (*key, "headers", name), more, filters)
        for template in templates_in(reply.json):
            self._check_template(template, (*key, "json"), more, filters)

    def _check_template(
        self, text: str, key: KeyPath, more: Mapping[str, Takes], filters: frozenset[str] = FILTERS
    ) -> Template | None:
        """Return the parsed template, or None after reporting its faults."""
        try:
            template = parse_template(text, _MORE)
            known = {**REQUEST, **more}
            if not self._settings.events:  # for an error that names it
                known = {**known, **_ITEM}
            template.check(known, filters)
            for each in template.placeholders:
                self._check_placeholder(each)
        except ValueError as error:
            self._fault(str(error), *key)
            return None
        self._placeholders += template.placeholders
        return template

    def _check_placeholder(self, placeholder: Placeholder) -> None:
        """Check that a placeholder can have a value.

        Raises:
            ValueError: it cannot; the message has the reason.
        """
        check = {
            "header": self._check_header,
            "path": self._check_segment,
            "url": self._check_url,
            "form": self._check_form,
            "timestamp": self._check_time,
            "body": self._check_body,
            "item": self._check_item,
        }.get(placeholder.kind)
        if check is not None:
            try:
                check(placeholder.argument)
            except ValueError as error:
                raise ValueError(f"column {placeholder.column}: {placeholder}: {error}") from None

    def _check_header(self, name: str) -> None:
        header_name(name)

    def _check_segment(self, name: str) -> None:
        if name not in self._names:
            near = difflib.get_close_matches(name, self._names, 1)
            known = ", ".join(self._names) or "no segment has a name"
            hint = f"did you mean {{path:{near[0]}}}?" if near else f"segments with a name: {known}"
            raise ValueError(f"no path has this segment; {hint}")

    def _check_url(self, _: str) -> None:
        if self._settings.public_url is None:
            raise ValueError("needs `public_url`: the scheme and host in the sender's URL")

    def _check_form(self, _: str) -> None:
        form = self._settings.body
        if form not in ("auto", "form"):
            raise ValueError(f'needs body = "form" or "auto"; this source reads "{form}"')
        self._check_has_body()

    def _check_time(self, _: str) -> None:
        given = self._given
        if not isinstance(given, Signed) or not (given.timestamp_header or given.timestamp_field):
            raise ValueError("needs a signature with timestamp_header or timestamp_field")

    def _check_body(self, path: str) -> None:
        if path:
            if self._settings.body == "text":
                raise ValueError('a text has no fields; write {body}, or body = "json"')
            try:
                parse_path(path)
            except ValueError as error:
                raise ValueError(f"{error} such as order.items.0.sku or 'a.b'.c") from None
        self._check_has_body()

    def _check_item(self, path: str) -> None:
        if not self._settings.events:
            raise ValueError("needs `events`: the place of the list whose items are events")
        self._check_body(path)

    def _check_has_body(self) -> None:
        methods = self._settings.methods
        if set(methods) <= set(WITHOUT_BODY) and not self._settings.handshakes:
            raise ValueError(f"requests with {' or '.join(methods)} have no body; use {{query:…}}")

    def _check_credentials(self) -> None:
        """Check that the scheme has its required settings, and no others."""
        settings, given = self._settings, self._given
        if settings.verification is None:
            text = (
                'missing; set how the sender proves its identity: "bearer", "standard-webhooks", '
                '{ hmac = { header = "X-Signature" } } or another table, or "none" to accept everybody'
            )
            self._fault(text, "verify")
            return
        asymmetric = isinstance(given, Ed25519 | Ecdsa)
        needed = {"secrets": given is not None and not asymmetric, "public_keys": asymmetric}
        for key, is_needed in needed.items():
            if is_needed and not getattr(settings, key):
                example = '[{ env = "NAME" }]' if key == "secrets" else '["…"]'
                self._fault(f"missing; `verify` needs them: {key} = {example}", key)
            elif not is_needed and getattr(settings, key):
                other = "; remove them, or choose another `verify`" if given is None else "; remove them"
                self._fault(f"`verify` does not use them{other}", key)
        if isinstance(given, Signed):
            self._check_signed(given, ("verify", type(given).__name__.lower()))
        elif isinstance(given, ApiKey) and given.value is not None:
            self._check_template(given.value, ("verify", "api_key", "value"), self._item)

    def _check_signed(self, given: Signed, key: KeyPath) -> None:
        if self._add(given.faults(), key):
            return
        template = self._check_template(given.signed, (*key, "signed"), {}, _NO_FILTERS)
        if template is None:
            return
        kinds = {(each.kind, each.argument) for each in template.placeholders}
        covers = ("body", "") in kinds or ("form", "sorted") in kinds or given.body_sha256 is not None
        if not covers and not set(self._settings.methods) <= set(WITHOUT_BODY):
            text = "the signed text lacks {body}, so anybody could change the body of a signed request"
            self._fault(text, *key, "signed")

    def _check_first_of_list(self) -> None:
        used = {_lowered(f"{each.kind}:{each.argument}") for each in self._placeholders}
        for at, text in enumerate(self._settings.first_of_list):
            if _lowered(text) not in used:
                self._fault(f"no template contains {{{text}}}", "first_of_list", at)


def _lowered(text: str) -> str:
    """Return a place with the name of a header in lower case."""
    return text.lower() if text.startswith("header:") else text
