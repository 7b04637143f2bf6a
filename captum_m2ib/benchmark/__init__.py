"""Benchmarks, each one command: ``captum-m2ib benchmark NAME``."""
