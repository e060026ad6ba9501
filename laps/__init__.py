"""LAPS: what all its services share."""
