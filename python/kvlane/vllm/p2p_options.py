"""The options of the P2P connector, those of the old P2pNcclConnector included."""

import dataclasses
import logging
import os
import stat
from collections.abc import Mapping
from typing import Any

from kvlane._native import ConfigError
from kvlane.vllm.options import (
    LEGACY,
    LOAD_FAILURE_POLICIES,
    read_choice,
    read_flag,
    read_number,
    read_options,
    read_text,
    refused,
)

logger = logging.getLogger("vllm.kvlane")

LANES = ("auto", "shm", "tcp", "cuda", "nccl")

#: Options that the old connector needed and this one does not.
_OBSOLETE = ("send_type", "mem_pool_size_gb", "nccl_num_channels")
#: Fields of vLLM's KVTransferConfig (up to 0.31) that only the old connector was meant to read, with their defaults.
_OBSOLETE_FIELDS = {"kv_rank": None, "kv_parallel_size": 1, "kv_ip": "127.0.0.1", "kv_buffer_size": 1e9}

_SECRET_BYTES_MIN = 16
_SECRET_BYTES_MAX = 4096
_PEERS_MAX = 1024


@dataclasses.dataclass(frozen=True)
class P2pOptions:
    """Options of the P2P connector. Every field is an option of the same name."""

    #: Address of a proxy that wants to be told of this server, its port, and the port of this server's own HTTP.
    proxy_ip: str | None = None
    proxy_port: int | None = None
    http_port: int | None = None
    #: How bytes are moved: by what the two sides can do ("auto"), or forced.
    lane: str = "auto"
    #: Address to listen on. None: all addresses.
    host: str | None = None
    #: Longest time that prefill keeps blocks for a decode server that does not come, in ms.
    lease_ms: int = 30_000
    #: Longest time that a request waits for its prefill to begin.
    ask_timeout_ms: int = 10_000
    #: Longest time that a request waits for its KV once its prefill has begun.
    transfer_timeout_ms: int = 60_000
    #: Longest silence of a peer before it counts as dead. Heartbeats come every second.
    peer_timeout_ms: int = 5000
    #: File with a secret that all servers share. Without one, whoever reaches the port may read KV.
    secret_file: str | None = None
    #: Addresses, networks (10.0.0.0/8) and host names of prefill servers that decode connects to. Empty: any.
    allowed_peers: tuple[str, ...] = ()
    #: Copying threads, each with a TCP connection of its own to each peer that needs one.
    connections: int = 2
    #: Share of the cache that prefill may hold for others after their requests ended, in percent.
    leased_percent: int = 50
    #: Share of the cache that decode may set aside for requests whose KV is still coming, in percent.
    parked_percent: int = 50
    #: "recompute": sets vLLM's kv_load_failure_policy, so that a failed transfer costs time and not the request.
    load_failure_policy: str = "recompute"
    #: Names the weights, in place of file names, sizes and times. For servers with copies of their own.
    model_identity: str | None = None
    #: Ask vLLM for the layout in which a block is one piece (vLLM 0.29 and newer).
    block_outermost_layout: bool = False
    #: Of the old connector, without effect.
    send_type: Any = None
    mem_pool_size_gb: Any = None
    nccl_num_channels: Any = None

    def secret(self) -> bytes | None:
        """The content of the secret file without the line end."""
        if self.secret_file is None:
            return None
        try:
            with open(self.secret_file, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                secret = file.read(_SECRET_BYTES_MAX + 2).rstrip(b"\r\n")
        except OSError as error:
            raise ConfigError(f"secret_file '{self.secret_file}' cannot be read: {error.strerror}") from error
        if not _SECRET_BYTES_MIN <= len(secret) <= _SECRET_BYTES_MAX:
            raise ConfigError(
                f"secret_file '{self.secret_file}' has {len(secret)} bytes, allowed: {_SECRET_BYTES_MIN} to "
                f"{_SECRET_BYTES_MAX}"
            )
        if mode & stat.S_IROTH:
            logger.warning("kvlane: every user of this machine can read secret_file '%s'", self.secret_file)
        return secret


def parse_p2p_options(extra_config: Mapping[str, Any] | None) -> P2pOptions:
    """Reads the options; an unknown name or a value of a wrong kind is a `ConfigError` that says what is allowed."""
    options = P2pOptions(**read_options(extra_config, _READERS))
    if (options.proxy_ip is None) != (options.proxy_port is None):
        # As the old connector: manifests that were made from a template have one of them.
        given, missing = ("proxy_ip", "proxy_port") if options.proxy_port is None else ("proxy_port", "proxy_ip")
        logger.warning("kvlane: %s is given without %s, so this server announces itself nowhere", given, missing)
        return dataclasses.replace(options, proxy_ip=None, proxy_port=None)
    if options.proxy_ip is not None and options.http_port is None:
        raise ConfigError("proxy_ip is given without http_port, the port that the proxy shall send requests to")
    return options


def obsolete_options(transfer: Any) -> list[str]:
    """Names of what a configuration (vLLM's KVTransferConfig) still sets and nobody reads any more."""
    extra = transfer.kv_connector_extra_config or {}
    legacy = extra.get(LEGACY)
    found = sorted(legacy) if isinstance(legacy, Mapping) else []
    for name, default in _OBSOLETE_FIELDS.items():
        if name not in found and getattr(transfer, name, default) != default:
            found.append(name)
    return found + [name for name in _OBSOLETE if name in extra]


def _anything(name: str, value: Any) -> Any:
    return value


def _read_text_or_none(name: str, value: Any) -> str | None:
    # Manifests that were made from a template leave these empty.
    return None if value in (None, "") else read_text(name, value)


def _digits_or_number(low: int, high: int) -> Any:
    """A reader of numbers that old manifests write as text."""
    read = read_number(low, high)

    def reader(name: str, value: Any) -> int | None:
        if value in (None, ""):
            return None
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= len(str(high)):
            value = int(value)
        return read(name, value)

    return reader


def _peers(name: str, value: Any) -> tuple[str, ...]:
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or len(given) > _PEERS_MAX:
        raise refused(name, value, f"a list of at most {_PEERS_MAX} addresses, networks or host names")
    peers = []
    for peer in given:
        text = peer.strip() if isinstance(peer, str) else ""
        if not text or any(character.isspace() for character in text):
            raise refused(
                name, value, 'a list of addresses, networks or host names, such as ["10.0.0.0/8", "decode-0"]'
            )
        peers.append(text)
    return tuple(peers)


def _host(name: str, value: Any) -> str | None:
    host = _read_text_or_none(name, value)
    return host[1:-1] if host is not None and host.startswith("[") and host.endswith("]") else host


_READERS: dict[str, Any] = {
    "proxy_ip": _read_text_or_none,
    "proxy_port": _digits_or_number(1, 65535),
    "http_port": _digits_or_number(1, 65535),
    "lane": read_choice(*LANES),
    "host": _host,
    "lease_ms": read_number(100, 3_600_000),
    "ask_timeout_ms": read_number(1, 600_000),
    "transfer_timeout_ms": read_number(1, 600_000),
    "peer_timeout_ms": read_number(3000, 600_000),
    "secret_file": read_text,
    "allowed_peers": _peers,
    "connections": read_number(1, 16),
    "leased_percent": read_number(1, 90),
    "parked_percent": read_number(1, 90),
    "load_failure_policy": read_choice(*LOAD_FAILURE_POLICIES),
    "model_identity": read_text,
    "block_outermost_layout": read_flag,
    # Nobody reads these any more, so whatever old manifests have there is right.
    **dict.fromkeys(_OBSOLETE, _anything),
}
