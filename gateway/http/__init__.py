"""The interface that OpenAI's clients speak, on a port of its own: `docs/openai.md`.

A body becomes a GenerateRequest and goes the way of every other request (`gateway.inference`);
what comes back is put into OpenAI's shapes.

The server is aiohttp's. It is made to live in an event loop that is not its own, beside grpc.aio;
it cancels a handler whose client has left, which is what gRPC does and what the streams here
build upon; a write waits while the client does not read. Uvicorn would be fewer packages, but it
wants to own the process, and tells of a client that has left only to those who ask.
"""
