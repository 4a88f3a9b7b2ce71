"""Which addresses only this machine can reach: the rule on which a server without API keys rests.

Owns the one answer that both use, the command line before it binds and the API before it answers. Refuses to know
sockets, DNS and HTTP.
"""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as reachable from elsewhere."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
