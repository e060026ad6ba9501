"""A gateway over a fake scheduler, in one event loop."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from tokenizers import Tokenizer as BackendTokenizer

sys.path.insert(0, str(Path(__file__).parent))

from fake_scheduler import FakeScheduler
from gateway_calls import eventually
from small_model import make_model_folder, stop_end

from gateway import deliveries, scheduler_link
from gateway.main import Gateway, serve
from gateway.tokenizer import Tokenizer, load_tokenizer
from laps.runtime import Lifetime
from laps.settings import Settings
from laps.v1 import inference_pb2_grpc, queue_pb2_grpc


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def backend(model_folder: Path) -> BackendTokenizer:
    return BackendTokenizer.from_file(str(model_folder / "tokenizer.json"))


@pytest.fixture
def tokenizer(model_folder: Path) -> Tokenizer:
    return load_tokenizer(str(model_folder))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnecting and asking again must not take a test's time."""
    monkeypatch.setattr(scheduler_link, "BACKOFF_FIRST_S", 0.002)
    monkeypatch.setattr(scheduler_link, "BACKOFF_MAX_S", 0.02)
    monkeypatch.setattr(deliveries, "REFOLLOW_AFTER_S", 0.02)


@pytest_asyncio.fixture
async def scheduler(backend: BackendTokenizer) -> AsyncIterator[FakeScheduler]:
    size = backend.get_vocab_size(with_added_tokens=True)
    fake = FakeScheduler(size, lambda planned, stopping: stop_end(backend, planned, stopping))
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
def settings(model_folder: Path) -> Callable[..., Settings]:
    """Settings of a gateway on any free port."""

    def make(**changes: Any) -> Settings:
        given: dict[str, Any] = {
            "target": str(model_folder),
            "port": 0,
            "default_max_tokens": 40,
            "drain_s": 1.0,
        }
        return Settings(**(given | changes))

    return make


class Harness:
    """A running gateway with stubs to call it."""

    def __init__(
        self, gateway: Gateway, scheduler: FakeScheduler, lifetime: Lifetime, **options: Any
    ) -> None:
        self.gateway = gateway
        self.lifetime = lifetime
        self.scheduler = scheduler
        self.address = f"127.0.0.1:{gateway.port}"
        self.channel = grpc.aio.insecure_channel(self.address, options=list(options.items()))
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.queue: Any = queue_pb2_grpc.QueueServiceStub(self.channel)


@pytest_asyncio.fixture
async def start_gateway(
    scheduler: FakeScheduler, settings: Callable[..., Settings]
) -> AsyncIterator[Callable[..., Any]]:
    """Starts a gateway that is connected to the fake scheduler."""
    running: list[Harness] = []

    async def start(*, wait: bool = True, heartbeat_timeout_s: float = 60.0, **changes: Any) -> Harness:
        address = f"127.0.0.1:{scheduler.port}"
        lifetime = Lifetime()
        gateway = await serve(settings(**({"scheduler_address": address} | changes)), lifetime)
        # Set here, since they are no settings. A test of what comes when a time is up has its own.
        gateway.link._heartbeat_interval_s = 0.1
        gateway.link._heartbeat_timeout_s = heartbeat_timeout_s
        gateway.link._retry_s = 60.0
        harness = Harness(gateway, scheduler, lifetime)
        running.append(harness)
        if wait:
            await eventually(lambda: scheduler.streams and gateway.link.connected)
        return harness

    yield start
    for harness in running:
        await harness.channel.close()
        await harness.gateway.stop(0.0)


@pytest_asyncio.fixture
async def harness(start_gateway: Callable[..., Any]) -> Harness:
    return await start_gateway()  # type: ignore[no-any-return]
