"""What of the settings may change while the server runs, and how a change comes into force.

Owns the rule that a reload takes all that may change or, when anything is wrong, nothing. Refuses to know where the
settings come from and who asked. Keys and quotas in the store need no reload: a change is seen within a second.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import InvalidRequestError
from server.settings import RELOADABLE, Settings
from server.settings_sources import SettingsError
from server.tenancy.quotas import LIMIT_NAMES, Limits

ReadSettings = Callable[[], Settings]


@dataclass(frozen=True, slots=True)
class Reloaded:
    """`changed` are in force now; `needs_restart` differ from what is in force and stay so until a restart."""

    settings: Settings
    changed: tuple[str, ...]
    needs_restart: tuple[str, ...]


def reload_settings(current: Settings, read: ReadSettings) -> Reloaded:
    """Reads them anew. Raises InvalidRequestError (`invalid_settings`) when they are wrong; nothing changes then."""
    try:
        found = read()
    except SettingsError as error:
        raise InvalidRequestError(
            f"The settings are wrong; the old ones stay in force: {error}", param=error.key, code="invalid_settings"
        ) from error
    differing = [name for name in Settings.model_fields if getattr(found, name) != getattr(current, name)]
    changed = {name: getattr(found, name) for name in differing if name in RELOADABLE}
    settings = current.model_copy(update=changed)
    logging.getLogger().setLevel(settings.log_level.upper())
    return Reloaded(settings, tuple(changed), tuple(name for name in differing if name not in RELOADABLE))


def default_limits(settings: Settings) -> Limits:
    """Those of tenants for which the store has none."""
    return Limits(**{name: getattr(settings, f"default_{name}") for name in LIMIT_NAMES})
