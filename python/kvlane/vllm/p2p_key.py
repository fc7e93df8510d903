"""Which hand-over a request takes part in: the transfer key, the role in it, and where the prefill server is.

A proxy says so in one of two ways. The header ``X-Request-Id`` of both calls, from which vLLM makes request ids, holds
``___prefill_addr_HOST:PORT___decode_addr_HOST:PORT_UID``; or the request bodies carry ``kv_transfer_params``:

- to the prefill server ``{"do_remote_decode": true}``, with an optional ``"transfer_id"``. Its answer then carries the
  parameters for the decode server;
- to the decode server ``{"do_remote_prefill": true, "transfer_id": "T", "remote_host": "p-0", "remote_port": 14579}``.
  Address and id may also come from the header.

A request without either is served locally. vLLM wraps what the proxy sent: ``cmpl-H-0-89abcdef`` is prompt 0 of the
call with header H, and the last part is new in every engine. So the name H is taken out step by step; one regular
expression would be ambiguous, because H may end in digits or in a group of eight hex digits itself.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

#: A transfer key is at most so long, in UTF-8. A longer name is replaced by its hash.
KEY_BYTES_MAX = 512
#: No host name is longer; what is longer is no address.
HOST_LENGTH_MAX = 255

_WRAPPED = re.compile(r"(?:(\d{1,9})_)?(chatcmpl|cmpl|generate-tokens)-(.*)", re.DOTALL)
_CHILD = re.compile(r"(\d{1,9})_(.*)", re.DOTALL)
_RANDOM = re.compile(r"(.*)-[0-9a-f]{8}", re.DOTALL)
_PROMPT_INDEX = re.compile(r"(.*)-(\d{1,9})", re.DOTALL)
_ADDRESSES = re.compile(r"___prefill_addr_(.+?):(\d{1,5})___decode_addr_(.+):(\d{1,5})_(.+)$", re.DOTALL)
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")

#: Longer names are no proxy's. Clients choose them, and searching takes time that grows with the square of the length.
_NAME_CHARACTERS_MAX = 2048

#: The environment variable that turns random suffixes of request ids off (vLLM 0.17 and newer).
_SWITCH = "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"


@dataclasses.dataclass(frozen=True)
class Address:
    """Where rank 0 of a server listens."""

    host: str
    port: int


@dataclasses.dataclass(frozen=True)
class Handover:
    """One request's part in a hand-over."""

    #: Equal on both sides and on no other request of the same proxy.
    key: str
    #: The name from which the key was made; all prompts of a call share it.
    name: str
    #: Where the KV is, None if nobody said.
    prefill: Address | None
    decode: Address | None = None
    #: Which side the proxy made this the request of: "prefill", "decode", or None if only the server's role tells.
    side: str | None = None
    #: The proxy works with parameters, so the answer carries those for the decode server.
    answers_parameters: bool = False


@dataclasses.dataclass(frozen=True)
class _Id:
    """A vLLM request id taken apart."""

    name: str
    prompt_index: int
    child: int


def ids_are_random() -> bool:
    """Whether this vLLM puts a random suffix behind request ids (all do, unless they are told not to)."""
    try:
        from vllm import envs
    except ImportError:
        return True
    if _SWITCH not in getattr(envs, "environment_variables", {}):
        return True
    return os.environ.get(_SWITCH, "0").strip() in ("", "0")


def handover_of(request_id: str, parameters: Any, *, random_ids: bool) -> Handover | None:
    """The hand-over of a request (``parameters``: its ``kv_transfer_params``), None if it has none.

    Raises ValueError, with a text that says what is allowed, for parameters that cannot be understood.
    """
    parts = _taken_apart(request_id, random_ids)
    prefill, decode = _addresses(parts.name) if parts is not None else (None, None)
    if not isinstance(parameters, Mapping):
        parameters = {}
    side = _side(parameters)
    if side is None:
        if parts is None or prefill is None:
            return None
        return Handover(_key(parts), parts.name, prefill, decode)
    if parts is None:
        parts = _unwrapped(request_id)
    transfer_id = parameters.get("transfer_id")
    if transfer_id is not None:
        if not isinstance(transfer_id, str) or not transfer_id:
            raise ValueError(f"transfer_id is {transfer_id!r:.200}, allowed: a text that is not empty")
        parts = dataclasses.replace(parts, name=transfer_id)
    if side == "decode":
        given = _given_address(parameters)
        prefill = given or prefill
        if prefill is None:
            return None
    return Handover(_key(parts), parts.name, prefill, decode, side, answers_parameters=side == "prefill")


def parse_address(host: Any, port: Any) -> Address | None:
    """An address from a host (IPv6 with or without brackets) and a port, None if that is none."""
    if not isinstance(host, str) or isinstance(port, bool):
        return None
    host = host.strip()
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if isinstance(port, str) and port.isascii() and port.isdigit() and len(port) <= 5:
        port = int(port)
    if not isinstance(port, int) or not 1 <= port <= 65535:
        return None
    if len(host) > HOST_LENGTH_MAX or not _HOST.fullmatch(host):
        return None
    return Address(host, port)


def _taken_apart(request_id: str, random_ids: bool) -> _Id | None:
    wrapped = _WRAPPED.fullmatch(request_id)
    if wrapped is None:
        return None
    child, kind, rest = wrapped.groups()
    if random_ids:
        random = _RANDOM.fullmatch(rest)
        if random is None:
            return None
        rest = random.group(1)
    prompt_index = 0
    if kind == "cmpl":  # the others have one prompt, and digits at their end are the name's own
        indexed = _PROMPT_INDEX.fullmatch(rest)
        if indexed is None:
            return None
        rest, prompt_index = indexed.group(1), int(indexed.group(2))
    return _Id(rest, prompt_index, int(child or 0))


def _unwrapped(request_id: str) -> _Id:
    """An id that does not say what the proxy called the request. Children still differ by their number."""
    child = _CHILD.fullmatch(request_id)
    return _Id(child.group(2), 0, int(child.group(1))) if child is not None else _Id(request_id, 0, 0)


def _addresses(name: str) -> tuple[Address | None, Address | None]:
    found = _ADDRESSES.search(name) if len(name) <= _NAME_CHARACTERS_MAX else None
    if found is None:
        return None, None
    prefill_host, prefill_port, decode_host, decode_port, _ = found.groups()
    return parse_address(prefill_host, prefill_port), parse_address(decode_host, decode_port)


def _side(parameters: Mapping[str, Any]) -> str | None:
    to_decode, from_prefill = parameters.get("do_remote_decode"), parameters.get("do_remote_prefill")
    for name, value in (("do_remote_decode", to_decode), ("do_remote_prefill", from_prefill)):
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r:.200}, allowed: true or false")
    if to_decode and from_prefill:
        raise ValueError("do_remote_decode and do_remote_prefill are both true, allowed: one of them")
    if to_decode:
        return "prefill"
    return "decode" if from_prefill else None


def _given_address(parameters: Mapping[str, Any]) -> Address | None:
    host, port = parameters.get("remote_host"), parameters.get("remote_port")
    if host is None and port is None:
        return None
    address = parse_address(host, port)
    if address is None:
        raise ValueError(
            f"remote_host is {host!r:.200} and remote_port {port!r:.200}, allowed: a host name or address, and a port "
            "from 1 to 65535"
        )
    return address


def _key(parts: _Id) -> str:
    # Prompts and children of one call are transfers of their own.
    suffix = f" {parts.prompt_index} {parts.child}"
    try:
        named = (parts.name + suffix).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which UTF-8 does not have
        named = b""
    if named and len(named) <= KEY_BYTES_MAX:
        return parts.name + suffix
    digest = hashlib.sha256(parts.name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"sha256:{digest}{suffix}"
