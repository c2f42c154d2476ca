"""Credentials in URLs, users and signatures, kept out of files and messages, which have `***` in their place.

A recipe that is read back with that cannot run until the value is given again, see `load.load`. Names that differ by credentials alone name
the same file.
"""

from __future__ import annotations

import logging
import re
from typing import Any

HIDDEN = "***"
# A user with a password, or in http a token alone, up to the host; a secret may hold slashes. '::' joins sources, but for an IPv6 address.
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<place>(?:\[[0-9A-Fa-f:]+\]|(?!::)[^\s'\"<>|])+)")
_PARAMETER = re.compile(r"(?<=[?&;])(?P<name>[^=&;?#\s'\"]+)=(?P<value>(?:(?!::)[^&;#\s'\"<>|])*)")
_SECRET = re.compile(
    r"token|secret|passw|signature|credential|api[-_]?key|access[-_]?key|auth|key[-_]?pair|policy|^(sig|key|code|session|jwt|pwd|pass)$",
    re.I,
)
# Of a DeepSpeed JSON, the monitors' for example.
_SECRET_KEYS = frozenset({"api_key", "apikey", "password", "token", "secret", "secret_key", "access_key"})


def redact(text: str) -> str:
    """`text` with the credentials of all URLs in it replaced by HIDDEN."""
    if "://" in text:
        text = _URL.sub(lambda match: match["scheme"] + _without_user(match["place"], match["scheme"]), text)
    if "=" in text:
        text = _PARAMETER.sub(lambda match: f"{match['name']}={HIDDEN}" if _SECRET.search(match["name"]) else match[0], text)
    return text


def _without_user(place: str, scheme: str) -> str:
    authority, slash, path = place.partition("/")
    user, at, host = authority.rpartition("@")
    if at:
        return f"{HIDDEN}@{host}{slash}{path}" if ":" in user or scheme.lower().startswith("http") else place
    port = authority.partition(":")[2]
    if port and not port.isdecimal() and not authority.startswith("[") and "@" in path:  # a password with a slash in it
        return f"{HIDDEN}@{path.partition('@')[2]}"
    return place


def redacted(content: Any, key: str = "") -> Any:
    """Plain JSON with `redact` of every string, and HIDDEN for those under a key such as "token"."""
    if isinstance(content, str):
        return HIDDEN if key.lower() in _SECRET_KEYS and content else redact(content)
    if isinstance(content, dict):
        return {name: redacted(value, str(name)) for name, value in content.items()}
    return [redacted(value) for value in content] if isinstance(content, list | tuple) else content


def unsigned(name: str) -> str:
    """What of a file's URL stays when it is signed anew: no credentials and, if they were in its query, no query."""
    shown = redact(name)
    return shown.partition("?")[0] if f"={HIDDEN}" in shown else shown


def is_hidden(text: str) -> bool:
    """Whether something was left out of this value."""
    return f"://{HIDDEN}@" in text or f"={HIDDEN}" in text


def keep_out_of_logs() -> None:
    """Let all that is logged to the root's handlers go through `redact`."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, _Redacting) for known in handler.filters):
            handler.addFilter(_Redacting())


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if (shown := redact(text)) != text:
            record.msg, record.args = shown, None
        return True
