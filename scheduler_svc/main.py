"""The scheduler process: `laps scheduler`."""

from __future__ import annotations

import asyncio

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from laps import channels, logs, runtime
from laps.settings import Settings
from laps.v1 import queue_pb2_grpc, scheduler_pb2_grpc, worker_pb2_grpc
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.queue_service import QueueService
from scheduler_svc.scheduler_service import SchedulerService
from scheduler_svc.store.inspector import Inspector
from scheduler_svc.store.store import Store
from scheduler_svc.term import Terms
from scheduler_svc.worker_service import WorkerService
