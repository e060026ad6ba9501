"""Generated from protos/laps/v1 by protos/generate.py. Do not edit."""
