"""The worker: decodes leased requests with a target and a draft model."""
