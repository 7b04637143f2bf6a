"""Arithmetic, time and memory: ``captum-m2ib benchmark speed``."""
