"""Processes that are started while gRPC is at work, as `laps up` starts those that have ended."""

from __future__ import annotations

import os
import subprocess
import sys

CHILDREN = 300
"""Where gRPC's handlers run in them, 4 to 18 of these end by a signal."""

PROGRAM = """
import asyncio, collections, sys
import click
from laps import cli

@click.command()
def start_many():
    import grpc.aio
    import uvloop

    async def echo(requests, context):
        async for request in requests:
            await context.write(request)

    async def calls(address):
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream("/test/Echo")()
            while True:
                await call.write(b"?")
                await call.read()

    async def main():
        server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(echo)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Echo": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        calling = [asyncio.create_task(calls(f"127.0.0.1:{port}")) for _ in range(4)]
        codes = collections.Counter()
        for _ in range(int(sys.argv[1])):
            child = await asyncio.create_subprocess_exec("true")
            codes[await child.wait()] += 1
        for each in calling:
            each.cancel()
        await asyncio.gather(*calling, return_exceptions=True)
        await server.stop(0)
        print(dict(codes))

    uvloop.run(main())

cli.cli.add_command(start_many)
cli._COMMANDS["start-many"] = ("__main__:start_many", "")
sys.exit(cli.main(["start-many"]))
"""


def test_none_is_crashed_by_grpc() -> None:
    # As a user has it, and not as the tests set it for themselves.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    program = [sys.executable, "-c", PROGRAM, str(CHILDREN)]
    ended = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout) == (0, f"{{0: {CHILDREN}}}\n"), ended.stderr
