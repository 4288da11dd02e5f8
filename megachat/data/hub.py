"""The one place that asks whether the Hugging Face hub can be reached at all."""

import socket
import urllib.parse
import urllib.request

from huggingface_hub import constants


def hub_is_reachable() -> bool:
    """Whether the hub's name resolves, or a proxy would resolve it.

    The hub client repeats failing requests for most of a minute. On the many machines without a
    way out (compute nodes, CI) this question spares that minute.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
