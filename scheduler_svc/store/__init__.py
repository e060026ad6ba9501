"""A pool's durable state in Redis: keys, the functions that write them, commit, recovery, inspection."""
