"""Finds config.toml, and the socket of the daemon that uses it."""

import os
from collections.abc import Mapping
from pathlib import Path

from relay.config.installed_service import installed
from relay.config.schema import Config
from relay.errors import RelayError

VARIABLE = "RELAY_CONFIG"
PLACES = (Path("config.toml"), Path("/etc/relay/config.toml"))


def find_config(given: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the given file, else the file in `RELAY_CONFIG`, else the first existing file of `PLACES`.

    If all of these are missing, return the file of the installed service.

    Raises:
        RelayError: no file was given and no file exists.
    """
    path = look_for_config(given, environ)
    if path is None:
        places = " nor ".join(str(place) for place in PLACES)
        raise RelayError(
            f"there is no configuration: neither {places} exists",
            hint=f"name one with -c FILE or {VARIABLE}=FILE",
        )
    return path


def look_for_config(given: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the file as `find_config` does, or None if the command works without a config file."""
    if given is not None:
        return given
    if name := environ.get(VARIABLE):
        return Path(name)
    if (place := next((place for place in PLACES if _is_found(place)), None)) is not None:
        return place
    service = installed()
    return None if service is None else service.config


def _is_found(place: Path) -> bool:
    """Return whether a place has a config; False for a current folder that this user may not enter."""
    try:
        return place.exists()
    except OSError:
        return place.is_absolute()  # reading it then reports the error


def is_there(path: Path) -> bool:
    """Return whether a path exists; True if this user cannot find out."""
    try:
        return path.exists()
    except OSError:  # no permission for its folder, or its name is too long: using it reports the error
        return True


def socket_path(config: Config, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the admin API's unix socket: in systemd's runtime directory, else in the state directory."""
    runtime = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(runtime or config.state_dir) / config.admin.socket
