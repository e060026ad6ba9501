"""QueueService: the queue as the store has it, read in one consistent call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc

from laps import errors
from laps.v1 import queue_pb2, queue_pb2_grpc
from scheduler_svc.store import inspector_proto
from scheduler_svc.store.inspector import Inspector
from scheduler_svc.term import Terms

HEAD_LIMIT = 1000
PAGE_SIZE = 100
WATCH_INTERVAL_S = 0.5
WATCH_INTERVAL_LEAST_S = 0.05
