"""A TCP proxy that behaves badly: it cuts silent connections, or all after so many bytes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Proxy:
    """Between a client and 127.0.0.1:`target`.

    idle_s      a connection on which nothing came from the server for so long is cut
    cut_after   asked for each connection: bytes from the server after which it is cut; None: never
    cut_up_after  the same of bytes from the client
    num_cuts    connections cut so far
    """

    def __init__(
        self,
        target: int,
        *,
        idle_s: float | None = None,
        cut_after: Callable[[], int | None] = lambda: None,
        cut_up_after: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.target = target
        self.idle_s = idle_s
        self.cut_after = cut_after
        self.cut_up_after = cut_up_after
        self.num_cuts = 0
        self.num_connections = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        upward = asyncio.create_task(self._upward(reader, up_writer))
        try:
            if await self._downward(up_reader, writer):
                self.num_cuts += 1
        finally:
            upward.cancel()
            for one in (writer, up_writer):
                # as a cable that is pulled: no polite end
                one.transport.abort()
            await asyncio.gather(upward, return_exceptions=True)

    async def _upward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self.cut_up_after()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if left is not None:
                    data, left = data[:left], left - len(data)
                writer.write(data)
                await writer.drain()
                if left is not None and left <= 0:
                    self.num_cuts += 1
                    break
        writer.transport.abort()

    async def _downward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether it was cut here."""
        left = self.cut_after()
        while True:
            try:
                data = await asyncio.wait_for(reader.read(65536), self.idle_s)
            except TimeoutError:
                return True
            except ConnectionError:
                return False
            if not data:
                return False
            if left is not None:
                data, left = data[:left], left - len(data)
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                await writer.drain()
            if left is not None and left <= 0:
                return True


@asynccontextmanager
async def proxied(proxy: Proxy) -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await server.wait_closed()
