"""Opening a connection to the store, and turning what can be wrong with its address into one line."""

from __future__ import annotations

import re
from contextlib import ExitStack
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from mara.buffer import keys
from mara.buffer.config import ReplayConfig
from mara.buffer.runs import stored_bytes
from mara.common.addresses import hide_password
from mara.common.errors import UserError

ADDRESS_SETTING = "replay.redis_url"
SCHEMES = ("redis", "rediss", "unix")
OLDEST_VERSION = (6, 2)  # exclusive ranges of streams
_EMPTY_BYTES = 1 << 20  # what a server without data calls data stays below
_ALONE = "give the address of one that stands alone, or a list of them"

Value = str | bytes | memoryview | int | float | tuple[bytes | memoryview, ...]
"""What an argument of a command may be; a tuple is one value in parts."""


class _Packer:
    """Writes commands in the protocol of Redis, large values from where they lie.

    The packer of hiredis, the usual one, copies every command whole into fresh memory first.
    """

    _OWN_CHUNK_BYTES = 4096

    def pack(self, *arguments: Value) -> list[bytes | memoryview]:
        """Return the chunks of one command, to be sent one after another."""
        name, *rest = arguments
        assert isinstance(name, str | bytes)
        arguments = (*(name.encode() if isinstance(name, str) else name).split(), *rest)  # "SCRIPT LOAD"
        chunks: list[bytes | memoryview] = []
        text = b"*%d\r\n" % len(arguments)
        for argument in arguments:
            parts = argument if isinstance(argument, tuple) else (_bytes(argument),)
            text += b"$%d\r\n" % sum(len(part) for part in parts)
            for part in parts:
                if len(part) >= self._OWN_CHUNK_BYTES:
                    chunks += [text, memoryview(part)]
                    text = b""
                else:
                    text += part
            text += b"\r\n"
        return [*chunks, text]


def _bytes(value: str | bytes | memoryview | int | float) -> bytes | memoryview:
    return value if isinstance(value, bytes | memoryview) else str(value).encode()


def connect(
    url: str, connect_timeout_s: float = 5.0, *, writes: bool = True, field: str = ADDRESS_SETTING
) -> redis.Redis:
    """Return a client of the server at ``url`` that has been seen to accept writes, if it is to have any.

    ``redis://[user:password@]host[:port][/db]``, ``rediss://…`` (TLS) or
    ``unix://[user:password@]/path[?db=0]``. The client is thread-safe, returns bytes, and does not
    retry by itself: its users do, because they know how long they can wait.

    Raises:
        UserError: the address is wrong, nothing answers there, it refuses the password or the database,
            or it cannot be written to. The message begins with ``field``, where the address comes from, and
            shows it without its password.
    """
    _check_address(url, field)
    try:
        client = redis.Redis.from_url(
            url,
            protocol=2,
            decode_responses=False,
            socket_connect_timeout=connect_timeout_s,
            socket_timeout=connect_timeout_s,
            health_check_interval=15,
            retry=Retry(NoBackoff(), 0),
            command_packer=_Packer(),
        )
        about = client.info("server")
        version = str(about["redis_version"])
        if writes:
            client.set(keys.PROBE, b"1", px=1000)
    except redis.AuthenticationError as error:
        raise _error(field, url, "refuses the user name or password", "correct them") from error
    except redis.exceptions.NoPermissionError as error:
        raise _error(
            field, url, f"refuses a command ({_line(error)})", "allow the user +@all ~mara:*"
        ) from error
    except redis.ReadOnlyError as error:
        raise _error(field, url, "is a read-only replica", "give the address of the primary") from error
    except redis.OutOfMemoryError as error:
        raise _error(field, url, "is full", "raise its maxmemory or delete data there") from error
    except redis.TimeoutError as error:
        raise _error(
            field, url, f"did not answer within {connect_timeout_s:g} s", "check host, port and network"
        ) from error
    except (TypeError, ValueError) as error:  # what redis-py says to an option that it does not know
        raise _error(field, url, "has an option after '?' that cannot be used", "remove it") from error
    except redis.exceptions.InvalidResponse as error:
        raise _error(
            field,
            url,
            "does not answer as Redis or Valkey does",
            "correct the address, or begin it with rediss:// if the server uses TLS",
        ) from error
    except (redis.ConnectionError, redis.ResponseError) as error:
        if re.search(r"DB index|invalid database", str(error), re.IGNORECASE):
            raise _error(field, url, "has no such database", "give one that it has, usually 0") from error
        if "MISCONF" in str(error):
            raise _error(
                field, url, "cannot write to its disk", "make room there, or see what its own log says"
            ) from error
        raise _error(
            field, url, f"cannot be used ({_line(error)})", "start the server or correct the address"
        ) from error
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_VERSION:
        raise _error(field, url, f"is Redis {version}", "use Redis 6.2 or newer, or Valkey")
    if about.get("redis_mode") == "cluster":
        raise _error(
            field, url, "is a node of a Redis Cluster, which would spread the keys of a script", _ALONE
        )
    return client


def check_stores(config: ReplayConfig, num_actors: int, run_id: str | None = None) -> None:
    """Every address of ``replay.redis_url`` can be used, and every server keeps what its shards store.

    Shards on one server add up, also where it goes by two names. What run ``run_id``, which is to go on, has
    there already is part of what it needs.

    Raises:
        UserError: the first address with which something is wrong, without its password.
    """
    shards_at: dict[str, list[int]] = {}
    with ExitStack() as exits:
        clients = [exits.enter_context(connect(url, config.connect_timeout_s)) for url in config.redis_urls]
        for shard, client in enumerate(clients):
            # A random number of the process; a server that does not tell is told by its address.
            server = str(client.info("server").get("run_id") or config.redis_urls[shard])
            shards_at.setdefault(server, []).append(shard)
        for shards in shards_at.values():
            needed_bytes = config.store_max_bytes(num_actors, shards)
            client = clients[shards[0]]
            own_bytes = 0
            if run_id is not None:
                shards_in: dict[int, list[int]] = {}  # One server may have them in several databases.
                for shard in shards:
                    database = int(clients[shard].connection_pool.connection_kwargs.get("db") or 0)
                    shards_in.setdefault(database, []).append(shard)
                own_bytes = sum(
                    stored_bytes(clients[those[0]], run_id, those) for those in shards_in.values()
                )
            check_memory(client, config.redis_urls[shards[0]], needed_bytes, own_bytes)


def _signed(count: int) -> int:
    """What a server meant by ``count``, printed as 64 bit without a sign.

    Its data are its memory less what it keeps beside them. The two are counted one after the other, and on a
    server that holds next to nothing the difference may fall below zero.
    """
    return count - (1 << 64) if count >= 1 << 63 else count


def check_memory(client: redis.Redis, url: str, needed_bytes: int, own_bytes: int = 0) -> None:
    """Refuse a server that would evict episodes, or that has less room than ``needed_bytes``.

    What it holds already takes its part, but for ``own_bytes`` that are among those needed.

    Policies that only evict keys which expire are none that evict: of a run's keys only records on their way
    into the log expire, and those are sent again.

    Raises:
        UserError: the server at ``url`` is one of those. The message shows the address without its password.
    """
    memory = client.info("memory")
    # A server that does not tell has no limit that we could know of; 0 is none.
    limit_bytes, policy = int(memory.get("maxmemory", 0)), str(memory.get("maxmemory_policy", "noeviction"))
    if limit_bytes and policy.startswith("allkeys"):
        raise _error(
            ADDRESS_SETTING,
            url,
            f"has maxmemory-policy {policy}, which would evict episodes and weights when it is full",
            "set it to noeviction",
        )
    if 0 < limit_bytes < needed_bytes:
        raise _error(
            ADDRESS_SETTING,
            url,
            f"has maxmemory {limit_bytes}, this run needs {needed_bytes} bytes",
            "raise it or lower replay.log_max_bytes",
        )
    others_bytes = _signed(int(memory.get("used_memory_dataset", 0))) - own_bytes
    if limit_bytes and others_bytes > _EMPTY_BYTES and others_bytes + needed_bytes > limit_bytes:
        raise _error(
            ADDRESS_SETTING,
            url,
            f"has maxmemory {limit_bytes}, of which other data take {others_bytes}, and this run needs "
            f"{needed_bytes} bytes",
            f"delete old runs (`mara store list {hide_password(url)}` shows them), raise it or lower "
            "replay.log_max_bytes",
        )


def _check_address(url: str, field: str) -> None:
    scheme = url.partition("://")[0]
    if "://" not in url or scheme not in SCHEMES:
        raise _error(field, url, "is not a server address", "write redis://, rediss:// or unix:// before it")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = None, None
    # A '/', '?' or '#' in the password ends the host part early; then the '@' is found after it.
    if parts is None or port == 0 or "@" in parts.path + parts.query + parts.fragment:
        raise _error(
            field,
            url,
            "cannot be read",
            "check the port, and write special characters of the password as %XX",
        )
    if scheme == "unix" and not parts.path:
        raise _error(field, url, "names no socket", "write unix:///path/of/the/socket")
    if scheme != "unix" and not re.fullmatch(r"/?\d*", parts.path):
        raise _error(field, url, f"has {parts.path!r} where the database number belongs", "end it with /0")


def _error(field: str, url: str, what: str, remedy: str) -> UserError:
    return UserError(f"{field}: {hide_password(url)} {what}; {remedy}")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
