"""Whose a prompt version is: what the tenant `shared` grants everyone, and what stays its owner's.

Calling is granted, and seeing that a version exists. Its numbers, the files that it was uploaded as and the probes that
test it are its owner's. Refuses to know how a version is found.
"""

from prompt_store.manifest import PromptVersion
from server.errors import PermissionDeniedError
from server.tenancy.keys import Caller


def may_change(caller: Caller, version: PromptVersion) -> bool:
    """Whether the version is the caller's to change, and what it is made of and tested by the caller's to read: that
    others may use what is in the tenant `shared` does not make it theirs.
    """
    return caller.can("admin") or (caller.can("write") and caller.tenant == version.tenant)


def check_may_read(caller: Caller, version: PromptVersion) -> PromptVersion:
    """The version, if what it is made of is the caller's to read. Raises PermissionDeniedError.

    Not 404: who gets here can call the version and knows that it is there.
    """
    if not may_change(caller, version):
        raise PermissionDeniedError(
            "A prompt's files and numbers are its owner's: reading them needs the scope 'write' of the tenant that has "
            "it. Calling it does not."
        )
    return version
