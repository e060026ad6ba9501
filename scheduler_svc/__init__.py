"""The scheduler. Its hot path may have been compiled: `compiled` decides which of both is imported."""

from scheduler_svc import compiled

compiled.install()
