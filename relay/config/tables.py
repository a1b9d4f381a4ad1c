"""Binds the tables of config.toml except sources; `plugin_loading.loader` adds the settings of plugins."""

import ipaddress
from pathlib import Path
from typing import Any

from relay.config import validators
from relay.config.binding import WRONG, Binder
from relay.config.message import FORMATS
from relay.config.origins import origins_of
from relay.config.problems import KeyPath, dotted, guess, shown
from relay.config.schema import Admin, Config, DestinationConfig, Plugins
from relay.config.secrets import Absent, Url
from relay.model import OPERATOR_SOURCE
from relay.routing.conditions import compile_conditions
from relay.routing.envelope import Path as EnvelopePath
from relay.routing.subscription import Patterns
from relay.signing import check_key

_OTHER_HEADERS = ("content-type", "user-agent", "traceparent")
"""Headers that the relay sets and an operator's `headers` may replace, but no signature."""


def bind_tables(binder: Binder) -> Config:
    """Bind everything except `[sources]`; reported wrong values are replaced by their defaults."""
    document = binder.document
    values = binder.fields(
        Config,
        {key: value for key, value in document.data.items() if key not in {"sources", "destinations"}},
        (),
        given={
            "path": document.path,
            "included": document.included,
            "origins": origins_of(document, binder.origin.environ),
            "state_dir": _state_dir(binder),
            "plugins": Plugins(dirs=tuple(binder.origin.folder / path for path in Plugins().dirs)),
        },
        hidden={"path", "included", "origins", "warnings"},
    )
    good: dict[str, Any] = {key: value for key, value in values.items() if value is not WRONG}
    good.setdefault("state_dir", document.path.parent)
    config = Config(**good, destinations=_destinations(binder))
    if config.admin.listen == config.server.listen and not config.admin.listen.endswith(":0"):
        text = "the same address as [server] listen; give it another port"
        binder.report(("admin", "listen"), text)
    _check_proxies(binder, config.admin)
    scheme = config.storage.url.reveal().partition(":")[0]
    if config.backup.every is not None and scheme in validators.POSTGRES:
        text = "the relay makes no backups of a PostgreSQL database: remove this key, see docs/storage.md"
        binder.report(("backup", "every"), text)
    if config.storage.listen_url is not None and scheme not in validators.POSTGRES:
        binder.warn(("storage", "listen_url"), "no effect: `url` is not a PostgreSQL database")
    if not config.is_node and not any(each.key == "storage.url" for each in binder.problems):
        for name, destination in config.destinations.items():
            if destination.shards > 1:
                text = "no effect: this daemon sends all deliveries, because it is not a node of a cluster"
                binder.warn(("destinations", name, "shards"), text)
    return config


def _check_proxies(binder: Binder, admin: Admin) -> None:
    """Check that a proxy can name users, and that nobody else on this machine can."""
    if admin.user_header is None:
        if admin.trusted_proxies:
            binder.report(("admin", "trusted_proxies"), "no effect without `user_header`")
        return
    if not admin.trusted_proxies:
        binder.report(("admin", "user_header"), "read only from `trusted_proxies`; add the proxy there")
    for index, proxy in enumerate(admin.trusted_proxies):
        if admin.proxy_secret is None and not proxy.startswith("unix:") and _is_local(proxy):
            text = "every user of this machine can connect from this address; set `proxy_secret`, too"
            binder.report(("admin", "trusted_proxies", index), text)


def _is_local(network: str) -> bool:
    """Return whether a network contains a loopback address."""
    given = ipaddress.ip_network(network, strict=False)
    own = map(ipaddress.ip_network, ("127.0.0.0/8", "::ffff:127.0.0.0/104", "::1/128"))
    return any(given.version == each.version and given.overlaps(each) for each in own)


def named_tables(binder: Binder, key: str) -> dict[str, dict[str, Any]]:
    """Return the tables `[key.NAME]`, after reporting invalid names."""
    tables = binder.tables(key)
    for name in tables:
        try:
            validators.name(name)
        except ValueError as error:
            binder.report((key, name), str(error))
    return tables


def _state_dir(binder: Binder) -> Path:
    """Return where the daemon writes by default; systemd may name several folders, colon-separated."""
    given = binder.origin.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return binder.origin.folder / given


def _destinations(binder: Binder) -> dict[str, DestinationConfig]:
    """Bind the destinations.

    A destination with a wrong key is added to `binder.incomplete`, with defaults for its wrong keys. The
    remaining checks still run on it, so that all problems are reported at once.
    """
    found, checked = {}, {}
    for name, table in named_tables(binder, "destinations").items():
        path: KeyPath = ("destinations", name)
        values = binder.fields(DestinationConfig, table, path, given={"name": name}, hidden={"name"})
        wrong = frozenset(key for key, value in values.items() if value is WRONG)
        good: dict[str, Any] = {key: value for key, value in values.items() if key not in wrong}
        destination = checked[name] = DestinationConfig(**{"url": Url(""), **good})
        _check_choice(binder, destination, path)
        _check_shards(binder, destination, path)
        if not wrong & {"signatures", "secrets", "headers"}:
            _check_signatures(binder, destination, path)
        if wrong:
            binder.incomplete[name] = destination, wrong
        else:
            found[name] = destination
        is_signed = table.get("secrets") or any(each.secrets for each in destination.signatures)
        if not is_signed and "signatures" not in wrong and table.get("format") not in FORMATS:
            binder.warn(path, "unsigned: it has no `secrets`, so its receiver cannot verify the sender")
    for name in checked:
        _check_stand_in(binder, checked, name)
    return found


def _check_stand_in(binder: Binder, destinations: dict[str, DestinationConfig], name: str) -> None:
    """Check that `on_dead` names existing destinations and that these references form no cycle."""
    key: KeyPath = ("destinations", name, "on_dead")
    way, stand_in = [name], destinations[name].on_dead
    while stand_in is not None:
        if stand_in not in destinations:
            if len(way) == 1:
                known = binder.document.data["destinations"]
                if stand_in not in known:
                    advice = guess(stand_in, known) or f"; known: {', '.join(known)}"
                    binder.report(key, f"unknown destination {shown(stand_in)}{advice}")
            return
        if stand_in in way:
            if stand_in == name:
                binder.report(key, f"forms a cycle: {' -> '.join([*way, stand_in])}")
            return
        way.append(stand_in)
        stand_in = destinations[stand_in].on_dead


def _check_shards(binder: Binder, destination: DestinationConfig, path: KeyPath) -> None:
    """Check that each shard gets a part of the limits, and that the deliveries can be divided."""
    if destination.shards == 1:
        return
    key: KeyPath = (*path, "shards")
    count, rate = destination.shards, destination.rate_limit
    if destination.concurrency < count:
        text = f"{count} shards need a `concurrency` of at least {count}, not {destination.concurrency}"
        binder.report(key, text)
    if rate is not None and rate.count < count:
        binder.report(key, f"{count} shards need a `rate_limit` of at least {count} attempts per period")
    if destination.group_by == ():
        binder.report(key, "`group_by = []` makes one group of all deliveries, which cannot be divided")


def _check_signatures(binder: Binder, destination: DestinationConfig, path: KeyPath) -> None:
    """Check that each scheme has keys that fit it, and headers that nothing else sets."""
    users = dict.fromkeys(_OTHER_HEADERS, "the relay itself")
    users |= {header.lower(): "`headers`" for header in destination.headers}
    for index, scheme in enumerate(destination.signatures):
        key: KeyPath = (*path, "signatures", index)
        for wrong, why in scheme.problems():
            binder.report((*key, wrong), why)
        for field in ("header", "timestamp_header"):
            if (header := getattr(scheme, field)) is None:
                continue
            try:
                if not scheme.is_standard:
                    validators.header_name(header)
            except ValueError as error:
                binder.report((*key, field), str(error))
            if (user := users.get(header.lower())) is not None:
                binder.report((*key, field), f"the header {header} is set by {user} already")
            users[header.lower()] = f"signatures[{index}]"
        _check_keys(binder, destination, index, path)


def _check_keys(binder: Binder, destination: DestinationConfig, index: int, path: KeyPath) -> None:
    """Check the keys of one scheme."""
    scheme = destination.signatures[index]
    entry: KeyPath = (*path, "signatures", index)
    place: KeyPath = (*entry, "secrets") if scheme.secrets else (*path, "secrets")
    keys = scheme.secrets or destination.secrets
    for number, secret in enumerate(keys):
        try:
            if not isinstance(secret, Absent):
                check_key(scheme, secret)
        except ValueError as error:
            own = scheme.is_standard or scheme.secrets
            binder.report(
                (*place, number),
                f"{error}{'' if own else f'; or give {dotted(entry[2:])} its own `secrets`'}",
            )
    if scheme.is_standard:
        return
    if not keys:
        binder.report(entry, "has no secrets; set `secrets` here or in the table of the destination")
    elif len(keys) > 1 and not scheme.separator:
        binder.report(
            entry,
            f"the header {scheme.header} contains one signature, but there are {len(keys)} secrets; "
            "set `secrets` of this scheme to a single secret",
        )


def _check_choice(binder: Binder, destination: DestinationConfig, path: KeyPath) -> None:
    """Check the patterns, conditions and paths of a destination."""
    try:
        Patterns(destination.events)
    except ValueError as error:
        binder.report((*path, "events"), str(error))
    try:
        if destination.where is not None:
            compile_conditions(destination.where)
    except ValueError as error:
        binder.report((*path, "where"), str(error))
    for field in ("order_by", "latest_by", "group_by"):
        given = getattr(destination, field)
        for index, text in enumerate(given if isinstance(given, tuple) else (given,)):
            try:
                if text is not None:
                    EnvelopePath.parse(text)
            except ValueError as error:
                binder.report((*path, field, *([index] if isinstance(given, tuple) else ())), str(error))
    tables = binder.document.data.get("sources")
    sources = tables if isinstance(tables, dict) else {}
    for index, pattern in enumerate(destination.events):
        source, dot, _ = pattern.removeprefix("!").partition(".")
        known = source in sources or source == OPERATOR_SOURCE
        if dot and not known and not set(source) & set("*?["):
            binder.warn((*path, "events", index), f"unknown source {shown(source)}{guess(source, sources)}")
